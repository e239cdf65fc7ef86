"""Adapted experts, in whole models and in one forward, compared with dense rotated weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.checking import check, gradients, pair, run_dense, vectors_of
from moe_models import NAMES, TARGETS, built, call_of, dense_experts
from one_layer import F32, F64
from oracles import dense_q, relative_error
from torch import Tensor, nn

import hra_fx


def model_pair(name: str, implementation: str, dtype: torch.dtype = F64, **fields: object) -> tuple[nn.Module, Any]:
    """A model, and an adapted copy with random vectors."""
    fields = {"r": 2, "target_parameters": TARGETS, **fields}
    return pair(lambda: built(name, dtype, implementation), (), dtype, **fields)


SORTS: list[dict[str, object]] = [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}]


@pytest.mark.parametrize(
    ("name", "implementation", "fields"),
    [
        *zip(NAMES, cycle(["eager"]), cycle(SORTS), strict=False),
        *((name, "batched_mm", SORTS[0]) for name in ("qwen3_moe", "gpt_oss")),
    ],
    ids=str,
)
def test_each_model_equals_dense_rotated_experts(name: str, implementation: str, fields: dict[str, object]) -> None:
    check(*model_pair(name, implementation, **fields), rtol=1e-11, **call_of(name))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_grouped_products_in_float32(name: str) -> None:
    base, model = model_pair(name, "grouped_mm", F32)
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
    with pytest.raises(hra_fx.UnsupportedLayerError, match="an adapter reflects its gate_up_proj, so it cannot"):
        hra_fx.add_adapter(model, "full", config)


# ---- one forward ----


class Experts(nn.Module):
    """A module with a 3-D parameter, whose forward is the argument of its call."""

    is_transposed = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 5, 6, dtype=torch.float64))

    def forward(self, use: Callable[[Experts], Any]) -> Any:
        return use(self)


def adapted() -> tuple[Any, Tensor, Tensor]:
    """Adapted experts, a copy of their vectors, and dense rotated weights that are differentiable in it."""
    config = hra_fx.HRAConfig(r=2, target_parameters=["experts.up"])
    experts = hra_fx.transform(nn.ModuleDict({"experts": Experts()}), config)["experts"]
    vectors = nn.init.normal_(experts.hra_up.hra_u["default"])
    leaf = vectors.detach().clone().requires_grad_()
    return experts, leaf, dense_experts(experts.up.detach(), leaf, transposed=False)


def test_the_weight_is_computed_once_in_a_forward() -> None:
    experts, leaf, dense = adapted()
    reads = experts(lambda own: [own.up for _ in range(3)])
    assert type(reads[0]) is Tensor and reads[0] is reads[1] is reads[2]
    assert relative_error(reads[0], dense) <= 1e-12
    again = experts(lambda own: own.up)
    assert again is not reads[0] and type(experts.up) is nn.Parameter
    (reads[0][1] * again[2]).sum().backward()
    (dense[1] * dense[2]).sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9


def test_a_read_without_gradients_before_one_with_them_and_in_another_thread() -> None:
    experts, _, dense = adapted()

    def use(own: Experts) -> tuple[Tensor, ...]:
        with torch.no_grad():
            first = own.up
        return first, own.up, pool.submit(lambda: own.up).result()

    with ThreadPoolExecutor(1) as pool:
        first, second, elsewhere = experts(use)
    assert not first.requires_grad and second.requires_grad
    assert relative_error(first, dense) <= 1e-12 and relative_error(second, dense) <= 1e-12
    assert elsewhere is experts.up  # no model runs in that thread


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(autocast: bool) -> None:
    experts, _, dense = adapted()
    experts = experts.float() if autocast else experts.bfloat16()
    x = torch.randn(7, 6, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = experts(lambda own: F.linear(x, own.up[1]))
    assert output.dtype is torch.bfloat16
    assert relative_error(output, x.double() @ dense[1].T) < 0.03
    output.sum().backward()
    assert experts.hra_up.hra_u["default"].grad.isfinite().all()


def test_compiled() -> None:
    experts, leaf, dense = adapted()
    x = torch.randn(7, 6, dtype=torch.float64)

    def read(weight: Tensor) -> Tensor:
        return torch.einsum("eod,nd->no", weight, x) + F.linear(x, weight[1])

    def run() -> Any:
        return experts(lambda own: read(own.up))

    actual, wanted = torch.compile(run, backend="aot_eager", fullgraph=True)(), read(dense)
    assert relative_error(actual, wanted) <= 1e-12
    actual.square().sum().backward()
    wanted.square().sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9


def test_a_forward_that_writes_into_the_weight_is_refused() -> None:
    experts, _, _ = adapted()
    message = "Experts.up: the forward writes into it. It is W Q while the model runs"
    with torch.no_grad(), pytest.raises(hra_fx.AdapterError, match=message):
        experts(lambda own: own.up.zero_())
    with torch.no_grad():
        experts.up.zero_()  # the parameter
    assert not experts.hra_up.hra_base.any()


def test_a_replica_of_data_parallel_is_refused() -> None:
    experts, _, _ = adapted()
    replica = experts._replicate_for_data_parallel()
    replica.up = experts.up.detach()
    with pytest.raises(hra_fx.AdapterError, match=r"Experts.up: FSDP1 and DataParallel .* Use DistributedData"):
        replica(lambda own: own.up)
