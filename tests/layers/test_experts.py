"""Adapted experts, in whole models and in one forward, compared with dense rotated weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers.checking import check, pair
from moe_models import NAMES, TARGETS, built, call_of, dense_experts
from one_layer import F32, F64
from oracles import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx


def model_pair(name: str, implementation: str, dtype: torch.dtype = F64, **fields: object) -> tuple[Any, Any]:
    """A model that loops over its experts in float64, and an adapted model with random vectors."""
    fields = {"r": 2, "target_parameters": TARGETS, **fields}
    base, model = pair(lambda: built(name, dtype, implementation), (), dtype, **fields)
    if implementation != "eager":
        base.double().set_experts_implementation("eager")  # type: ignore[operator]
    return base, model


SORTS: list[dict[str, object]] = [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}]
CASES: list[tuple[str, str, torch.dtype, dict[str, object]]] = [
    *((name, "eager", F64, fields) for name, fields in zip(NAMES, cycle(SORTS), strict=False)),
    *((name, "batched_mm", F64, {}) for name in ("qwen3_moe", "gpt_oss")),
    *((name, "grouped_mm", F32, {}) for name in ("qwen3_moe", "gpt_oss")),
]


@pytest.mark.parametrize(("name", "implementation", "dtype", "fields"), CASES, ids=str)
def test_each_model_equals_dense_rotated_experts(
    name: str, implementation: str, dtype: torch.dtype, fields: dict[str, object]
) -> None:
    base, model = model_pair(name, implementation, dtype, **fields)
    check(base, model, rtol=1e-11 if dtype is F64 else 1e-5, **call_of(name))


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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_reads_the_weight_of_each_expert(compiled: bool) -> None:
    experts, leaf, dense = adapted()
    x = torch.randn(7, 6, dtype=torch.float64)

    def run() -> Any:
        return experts(lambda own: sum(F.linear(x, own.up[i]) ** 2 for i in range(4)))

    actual = torch.compile(run, backend="aot_eager", fullgraph=True)() if compiled else run()
    wanted: Any = sum((x @ one.T) ** 2 for one in dense)
    assert relative_error(actual, wanted) <= 1e-12
    actual.sum().backward()
    wanted.sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_for_each_expert(reentrant: bool) -> None:
    experts, leaf, dense = adapted()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def forward(own: Experts) -> Any:
        parts = (lambda y, i=i: F.linear(y, own.up[i]).tanh() for i in range(4))
        return sum(checkpoint(part, x, use_reentrant=reentrant).sum() for part in parts)

    experts(forward).backward()
    torch.tanh(x.detach() @ dense.mT).sum().backward()
    assert relative_error(experts.hra_up.hra_u["default"].grad, leaf.grad) <= 1e-9


def test_the_weight_is_one_plain_tensor_in_a_forward_but_not_without_gradients_or_in_another_thread() -> None:
    experts, _, dense = adapted()

    def use(own: Experts) -> tuple[Tensor, ...]:
        with torch.no_grad():
            first = own.up
        return first, own.up, own.up, pool.submit(lambda: own.up).result()

    with ThreadPoolExecutor(1) as pool:
        first, second, third, elsewhere = experts(use)
    assert second is third and type(second) is Tensor and second.requires_grad and not first.requires_grad
    assert relative_error(first, dense) <= 1e-12
    assert elsewhere is experts.up is experts.hra_up.hra_base  # no model runs there


@pytest.mark.parametrize("change", ["in place", "a fused step", "a scale"])
def test_a_change_in_a_forward_counts_from_then_on(change: str) -> None:
    config = hra_fx.HRAConfig(r=2, target_parameters=["experts.up"], init_weights=False)
    model: Any = hra_fx.transform(nn.ModuleDict({"experts": Experts()}), config)
    vectors, base = model.experts.hra_up.hra_u["default"], model.experts.up.detach()

    def use(own: Experts) -> tuple[Tensor, Tensor]:
        first = own.up
        if change == "a scale":
            hra_fx.set_scale(model, "default", 0.0)
        elif change == "in place":
            with torch.no_grad():
                vectors.add_(0.5)
        else:  # it does not change the version of the vectors
            first.square().mul(torch.arange(6)).sum().backward()
            torch.optim.SGD([vectors], 0.1, fused=True).step()
        return first, own.up

    before, after = model.experts(use)
    wanted = base if change == "a scale" else dense_experts(base, vectors, transposed=False)
    assert relative_error(after, wanted) <= 1e-12 and relative_error(after, before) > 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(autocast: bool) -> None:
    """For the backward, a forward keeps no copy of the weight in float32."""
    experts, _, dense = adapted()
    experts = experts.float() if autocast else experts.bfloat16()
    x = torch.randn(7, 6, dtype=torch.float32 if autocast else torch.bfloat16)
    kept: list[Tensor] = []
    watched = torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), watched:
        output = experts(lambda own: F.linear(x, own.up[1]))
    assert output.dtype is torch.bfloat16
    assert not [one for one in kept if one.numel() == dense.numel() and one.dtype is not experts.up.dtype]
    assert relative_error(output, x.double() @ dense[1].T) < 0.03
    output.sum().backward()
    assert experts.hra_up.hra_u["default"].grad.isfinite().all()


def test_a_forward_that_writes_into_the_weight_is_refused() -> None:
    experts, _, _ = adapted()
    message = "the forward of the model writes into its up. It is W Q while the model runs"
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
