"""Adapted experts, read in a forward and in whole models, compared with dense rotated weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (registers torch.ops.transformers)
from layers.checking import check, gradients, pair, run_dense, vectors_of
from moe_models import NAMES, TARGETS, built, call_of, dense_experts
from one_layer import F32, F64
from oracles import dense_q, relative_error
from torch import Tensor, nn

import hra_fx

EXPERTS, D, OUT = 4, 6, 5


class Experts(nn.Module):
    """A module with a 3-D parameter in one of the two layouts."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        shape = (EXPERTS, D, OUT) if is_transposed else (EXPERTS, OUT, D)
        self.up = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        return use(self.up)


def adapted(is_transposed: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Adapted experts, their vectors, and the dense rotated weights, differentiable in a copy of the vectors."""
    config = hra_fx.HRAConfig(r=2, target_parameters=["experts.up"])
    model = hra_fx.transform(nn.ModuleDict({"experts": Experts(is_transposed)}), config)
    vectors = model["experts"].hra_up.hra_u["default"]
    nn.init.normal_(vectors)
    leaf = vectors.detach().clone().requires_grad_()
    base = model["experts"].hra_up.hra_base
    dense = dense_experts(base.detach(), leaf, is_transposed)
    return model["experts"], leaf, dense


IDS = torch.tensor([3, 0, 0, 1, 2])
OFFSETS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Of a weight `(experts, out, d)` and rows `(7, d)`.
    "linear": lambda w, x: F.linear(x, w[1]),
    "linear, index": lambda w, x: F.linear(x, w[torch.tensor(2)], torch.ones(OUT, dtype=x.dtype)),
    "matmul": lambda w, x: x @ w[1].T,
    "dense": lambda w, x: w.exp().sum() * x,
    "einsum": lambda w, x: torch.einsum("eod,nd->eno", w, x),
    "slice": lambda w, x: torch.bmm(w[1:3], x.mT.expand(2, -1, -1)),
    "mask": lambda w, x: w[torch.tensor([True, False, True, False])] @ x.mT,
    "bmm": lambda w, x: torch.bmm(w, x.mT.expand(EXPERTS, -1, -1)),
    "bmm, by keyword": lambda w, x: torch.bmm(w, mat2=x.mT.expand(EXPERTS, -1, -1)),
    "bmm, gathered": lambda w, x: torch.bmm(w[IDS], x[: len(IDS)].unsqueeze(-1)),
    "bmm, gathered and swapped": lambda w, x: torch.bmm(x[: len(IDS)].unsqueeze(1), w[IDS].mT),
    "bmm, rows": lambda w, x: torch.bmm(x.expand(EXPERTS, -1, -1), w.transpose(-2, -1)),
    "matmul, batch": lambda w, x: x.expand(EXPERTS, -1, -1) @ w.mT,
    "outputs": lambda w, x: F.linear(w[0], torch.ones(3, D, dtype=x.dtype)).sum() * x,
}
if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # transformers 5.0 has none
    READS["grouped"] = lambda w, x: torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), offs=OFFSETS)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("read", READS)
def test_reads_equal_those_of_dense_weights(read: str, is_transposed: bool) -> None:
    experts, leaf, dense = adapted(is_transposed)
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    own = x.detach().clone().requires_grad_()

    def result(weight: Tensor, x: Tensor) -> Tensor:
        return READS[read](weight.mT if is_transposed else weight, x)

    actual, wanted = experts(lambda weight: result(weight, x)), result(dense, own)
    assert relative_error(actual, wanted) <= 1e-12
    actual.square().sum().backward()
    wanted.square().sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9
    assert relative_error(x.grad, own.grad) <= 1e-9
    with torch.no_grad():
        assert relative_error(experts(lambda weight: result(weight, x)), wanted) <= 1e-12


def gathered_product(experts: nn.Module, weight: Tensor) -> Tensor:
    """The products of the batched experts of transformers, for one row for each of `IDS`."""
    torch.manual_seed(1)
    x = torch.randn(len(IDS), D, dtype=weight.dtype)
    return torch.bmm(x.unsqueeze(1), weight[IDS]) if experts.is_transposed else torch.bmm(weight[IDS], x.unsqueeze(-1))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_base_that_is_trained_too(is_transposed: bool) -> None:
    experts, leaf, _ = adapted(is_transposed)
    base = experts.hra_up.hra_base.requires_grad_(True)
    own = base.detach().clone().requires_grad_()
    experts(lambda weight: gathered_product(experts, weight)).square().sum().backward()
    gathered_product(experts, dense_experts(own, leaf, is_transposed)).square().sum().backward()
    assert relative_error(base.grad, own.grad) <= 1e-12


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(autocast: bool) -> None:
    experts, _, dense = adapted(False)
    experts = experts.float() if autocast else experts.bfloat16()
    x = torch.randn(7, D, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = [experts(lambda weight, index=index: F.linear(x, weight[index])) for index in (1, torch.tensor(1))]
        gathered = experts(lambda weight: gathered_product(experts, weight))
    assert {output.dtype for output in (*outputs, gathered)} == {torch.bfloat16}
    assert all(relative_error(output, x.double() @ dense[1].T) < 0.03 for output in outputs)
    gathered.sum().backward()
    assert experts.hra_up.hra_u["default"].grad.isfinite().all()


def test_compiled() -> None:
    experts, leaf, dense = adapted(True)
    x = torch.randn(7, D, dtype=torch.float64)

    def read(weight: Tensor) -> Tensor:
        return torch.bmm(weight.mT, x.mT.expand(EXPERTS, -1, -1)) + F.linear(x, weight.mT[1]).sum()

    actual, wanted = torch.compile(lambda: experts(read), backend="aot_eager", fullgraph=True)(), read(dense)
    assert relative_error(actual, wanted) <= 1e-12
    actual.square().sum().backward()
    wanted.square().sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9


def test_writes_are_refused() -> None:
    experts, _, _ = adapted(False)
    writes: list[Callable[[Tensor], Tensor]] = [lambda w: w.zero_(), lambda w: Write.apply(w)]
    for write in writes:
        message = r"Experts.up: \S*zero_\S* writes into the weight"
        with torch.no_grad(), pytest.raises(hra_fx.AdapterError, match=message):
            experts(write)
    with torch.no_grad():
        experts.up.zero_()  # the parameter
    assert not experts.hra_up.hra_base.any()


class Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.zero_()


# ---- whole models ----


def model_pair(name: str, implementation: str, dtype: torch.dtype = F64, **fields: object) -> tuple[nn.Module, Any]:
    """A model, and an adapted copy with random vectors."""
    fields = {"r": 2, "target_parameters": TARGETS, **fields}
    return pair(lambda: built(name, dtype, implementation), (), dtype, **fields)


CASES: list[tuple[str, str, dict[str, object]]] = [
    *((name, "eager", {}) for name in NAMES),
    *((name, "eager", fields) for name in ("mixtral", "llama4") for fields in ({"apply_GS": True}, {"r": 3})),
    *((name, "batched_mm", {}) for name in ("qwen3_moe", "gpt_oss")),
]


@pytest.mark.parametrize(("name", "implementation", "fields"), CASES, ids=str)
def test_each_model_equals_dense_rotated_experts(name: str, implementation: str, fields: dict[str, object]) -> None:
    check(*model_pair(name, implementation, **fields), rtol=1e-11, **call_of(name))


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_grouped_products_in_float32(name: str, r: int) -> None:
    base, model = model_pair(name, "grouped_mm", F32, r=r)
    base.double().set_experts_implementation("eager")  # type: ignore[operator]
    outputs = model(**call_of(name)).logits, run_dense(base, model, **call_of(name)).logits
    assert relative_error(*outputs) <= 1e-5
    leaves = list(vectors_of(model).values())
    for found, wanted in zip(*(gradients(output, leaves) for output in outputs), strict=True):
        assert relative_error(found, wanted) <= 1e-5


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_kwargs)?` is deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    base, model = model_pair("qwen3_moe", "eager")
    for part in (*base.modules(), *model.modules()):
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    check(base, model, **call_of("qwen3_moe"))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_no_rotated_weight_is_kept_for_backward(implementation: str) -> None:
    """Every tensor that autograd saves in the shape of an expert's weight is a weight of the base model."""
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    _, model = model_pair("qwen3_moe", implementation, dtype)
    weights = [p.detach() for n, p in model.named_parameters() if p.dim() == 3 and ".hra_u." not in n]
    known = [expert for weight in weights for expert in (*weight, *weight.mT)]
    shapes = {expert.shape for expert in known}
    others = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() != 3}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] in shapes and tensor.untyped_storage().data_ptr() not in others:
            saved.extend(tensor.detach().reshape(-1, *tensor.shape[-2:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**call_of("qwen3_moe")).logits.sum().backward()
    assert saved
    for tensor in saved:
        assert any(torch.equal(tensor, expert) for expert in known)


def test_a_report_has_the_values_of_all_experts_of_a_parameter() -> None:
    _, model = model_pair("qwen3_moe", "eager")
    rows = hra_fx.report(model).rows
    assert len(rows) == 4
    assert rows[0].path == "model.layers.0.mlp.experts.hra_gate_up_proj"
    assert rows[0].layer_type == "Qwen3MoeExperts.gate_up_proj 4x(16->32)"
    assert (rows[0].d, rows[0].r, rows[0].parameters) == (16, 2, 4 * 16 * 2)
    assert len(rows[0].angles) <= 4 and 0 < rows[0].share < 1
    dense = torch.block_diag(*map(dense_q, vectors_of(model)[rows[0].path].detach()))
    assert abs(rows[0].rotation - float((dense - torch.eye(len(dense))).norm())) < 1e-9
    assert float(hra_fx.orthogonality_loss(model).detach()) > 0


def test_experts_are_not_reflected_by_one_adapter_and_saved_by_another() -> None:
    _, model = model_pair("qwen3_moe", "eager")
    config = hra_fx.HRAConfig(target_modules=["q_proj"], modules_to_save=["0.mlp.experts"])
    with pytest.raises(hra_fx.UnsupportedLayerError, match="another adapter reflects its gate_up_proj"):
        hra_fx.add_adapter(model, "full", config)
