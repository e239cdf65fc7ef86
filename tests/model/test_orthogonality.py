"""The regulariser against its formula written out in float64, and its gradient, at the kink of the norm too."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import hra_fx
from hra_fx.layers.adapters import AdapterSpec
from hra_fx.model.orthogonality import orthogonality_loss

F64 = torch.float64
EXACT = 1e-14
CONV, LINEAR = 0, 3


def penalty(vectors: Tensor) -> Tensor:
    """`|U_n^T U_n - I|_F` in float64, one cosine after another; differentiable where it is not zero."""
    columns = [column / (column @ column).sqrt() for column in vectors.double().unbind(dim=1)]
    pairs = [(a @ b - float(i == j)) ** 2 for i, a in enumerate(columns) for j, b in enumerate(columns)]
    return torch.stack(pairs).sum().sqrt()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, dtype=F64), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5, dtype=F64))


def adapt(base: nn.Module, *targets: int, **fields: Any) -> Any:
    settings = {"r": 4, "init_weights": False, "target_modules": [str(target) for target in targets]}
    return hra_fx.transform(base, hra_fx.HRAConfig(**(settings | fields)))


def one_layer(r: int, **fields: Any) -> Any:
    torch.manual_seed(0)
    return adapt(nn.Sequential(nn.Linear(7, 3, dtype=F64)), 0, r=r, **fields)


def vectors_of(model: Any, layer: int = 0, name: str = "default") -> nn.Parameter:
    vectors: nn.Parameter = model[layer].hra_u[name]
    return vectors


def set_vectors(model: Any, vectors: Tensor) -> None:
    with torch.no_grad():
        vectors_of(model).copy_(vectors)


@pytest.mark.parametrize("r", [2, 3, 8])
def test_the_value_is_that_of_the_formula_summed_over_layers(r: int) -> None:
    model = adapt(network(), CONV, LINEAR, r=r)
    wanted = penalty(vectors_of(model, CONV)) + penalty(vectors_of(model, LINEAR))
    loss = orthogonality_loss(model)
    assert loss.shape == ()
    assert loss.dtype == F64
    assert relative_error(loss, wanted) < EXACT


@pytest.mark.parametrize("r", [2, 3, 8])
def test_the_gradient_is_that_of_the_formula(r: int) -> None:
    model = adapt(network(), CONV, LINEAR, r=r)
    orthogonality_loss(model).backward()
    for layer in (CONV, LINEAR):
        vectors = vectors_of(model, layer)
        (wanted,) = torch.autograd.grad(penalty(vectors), vectors)
        assert vectors.grad is not None
        assert relative_error(vectors.grad, wanted) < 1e-13


def test_the_gradient_is_that_of_finite_differences() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = one_layer(3)

        def forward(self) -> Tensor:
            return orthogonality_loss(self.model)

    penalised = Penalised()
    given = torch.randn(7, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: functional_call(penalised, {"model.0.hra_u.default": u}, ()), (given,))


def test_the_gradient_is_orthogonal_to_the_vectors_since_lengths_do_not_count() -> None:
    model = one_layer(3)
    orthogonality_loss(model).backward()
    vectors = vectors_of(model)
    assert vectors.grad is not None
    assert float(vectors.grad.norm()) > 1e-2
    assert float((vectors.grad * vectors.detach()).sum(dim=0).abs().max()) < EXACT


@pytest.mark.parametrize(
    "vectors",
    [torch.eye(7, 3), 4 * torch.eye(7, 3), torch.eye(7, 1), torch.zeros(7, 3)],
    ids=["orthonormal", "orthogonal", "one vector", "zero vectors"],
)
def test_the_gradient_at_the_kink_of_the_norm_is_zero(vectors: Tensor) -> None:
    model = one_layer(vectors.shape[1])
    set_vectors(model, vectors)
    loss = orthogonality_loss(model)
    loss.backward()
    # A zero vector is not at right angles to itself at length one: its place on the diagonal counts.
    assert float(loss.detach()) == (0.0 if vectors.any() else math.sqrt(3))
    assert torch.equal(vectors_of(model).grad, torch.zeros_like(vectors, dtype=F64))


def test_a_single_vector_costs_nothing() -> None:
    model = one_layer(1)
    loss = orthogonality_loss(model)
    loss.backward()
    assert float(loss.detach()) < EXACT
    assert float(vectors_of(model).grad.norm()) < EXACT


def test_equal_vectors_cost_the_most_and_have_no_gradient() -> None:
    model = one_layer(2, init_weights=True)
    loss = orthogonality_loss(model)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(math.sqrt(2), rel=EXACT)
    assert float(vectors_of(model).grad.norm()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("length", [1e-30, 1e-3, 1e25])
def test_lengths_do_not_count_even_at_the_end_of_the_range(length: float, dtype: torch.dtype) -> None:
    model = one_layer(3).to(dtype)
    wanted = penalty(vectors_of(model).detach())
    set_vectors(model, vectors_of(model) * torch.tensor([1.0, length, 1.0], dtype=dtype))
    loss = orthogonality_loss(model)
    loss.backward()
    assert relative_error(loss, wanted) < 10 * torch.finfo(dtype).eps
    assert bool(vectors_of(model).grad.isfinite().all())


def test_the_frozen_anchor_does_not_count() -> None:
    model = one_layer(3, init_weights=True)
    assert model[0].hra_u.anchor("default") is not None
    assert relative_error(orthogonality_loss(model), penalty(vectors_of(model))) < EXACT


def test_gram_schmidt_contributes_nothing() -> None:
    model = one_layer(3, apply_GS=True)
    loss = orthogonality_loss(model) + model(torch.ones(2, 7, dtype=F64)).sum()
    assert float(orthogonality_loss(model).detach()) == 0.0
    loss.backward()
    assert bool(vectors_of(model).grad.isfinite().all())


def test_every_active_adapter_counts_and_no_other() -> None:
    model = one_layer(3)
    box = model[0].hra_u
    for name, apply_GS in (("second", False), ("gs", True), ("idle", False)):
        box.put(name, AdapterSpec(r=2, apply_GS=apply_GS), torch.randn(7, 2, dtype=F64), None)
    box.active = ("default", "second", "gs")
    wanted = penalty(vectors_of(model)) + penalty(vectors_of(model, name="second"))
    loss = orthogonality_loss(model)
    loss.backward()
    assert relative_error(loss, wanted) < EXACT
    assert [name for name in box if box[name].grad is not None] == ["default", "second"]


def test_nothing_active_is_a_zero_that_can_be_added() -> None:
    model = one_layer(3)
    model[0].hra_u.active = ()
    weight = torch.ones(2, requires_grad=True)
    zero = orthogonality_loss(model)
    (weight.sum() + zero).backward()
    assert zero.shape == ()
    assert float(zero) == 0.0
    assert torch.equal(weight.grad, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_vectors_are_measured_in_float32(dtype: torch.dtype) -> None:
    model = adapt(network(), CONV, LINEAR).to(dtype)
    loss = orthogonality_loss(model)
    assert loss.dtype == torch.float32
    assert relative_error(loss, penalty(vectors_of(model, CONV)) + penalty(vectors_of(model, LINEAR))) < 1e-6


def test_vectors_of_two_dtypes_are_summed_in_the_wider() -> None:
    model = adapt(network(), CONV, LINEAR)
    model[CONV].float()
    wanted = penalty(vectors_of(model, CONV)) + penalty(vectors_of(model, LINEAR))
    loss = orthogonality_loss(model)
    assert loss.dtype == F64
    assert relative_error(loss, wanted) < 1e-7


def test_autocast_does_not_reach_it() -> None:
    model = one_layer(3).float()
    wanted = orthogonality_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        loss = orthogonality_loss(model)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, wanted)


def test_meta_vectors_give_a_meta_loss() -> None:
    assert orthogonality_loss(one_layer(3).to("meta")).is_meta


def test_descending_it_makes_the_vectors_orthogonal() -> None:
    model = one_layer(4)
    optimizer = torch.optim.SGD([vectors_of(model)], lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality_loss(model).backward()
        optimizer.step()
    # The norm is not squared, so a step of fixed size ends near the kink, not on it.
    assert float(penalty(vectors_of(model).detach())) < 0.2


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_wrapped_model_gives_the_same() -> None:
    model = one_layer(3)
    wanted = penalty(vectors_of(model))
    for wrapped in (torch.compile(model, backend="eager"), nn.ModuleDict({"inner": model})):
        assert relative_error(orthogonality_loss(wrapped), wanted) < EXACT


@pytest.mark.usefixtures("process_group")
def test_under_distributed_data_parallel_it_has_the_same_gradient() -> None:
    x = torch.ones(2, 7, dtype=F64)
    model = one_layer(3)
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    (wrapped(x).square().sum() + orthogonality_loss(wrapped)).backward()
    vectors = vectors_of(model)
    (wanted,) = torch.autograd.grad(model(x).square().sum() + penalty(vectors), vectors)
    assert relative_error(vectors_of(wrapped.module).grad, wanted) < 1e-13


def test_a_model_without_reflections_is_refused() -> None:
    with pytest.raises(hra_fx.AdapterError, match=r"^Linear: it has no reflections\. Call hra_fx\.transform"):
        orthogonality_loss(nn.Linear(3, 2))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(hra_fx.AdapterError, match=r"^model: 3 is no torch\.nn\.Module\."):
        orthogonality_loss(3)  # type: ignore[arg-type]
