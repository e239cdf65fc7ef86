"""`hra_fx::rotate` against the dense product, with first and second derivatives, and torch's checks of operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from export.programs import normal
from oracles import dense_q, relative_error
from torch import Tensor

from hra_fx.export.ops import ROTATE

CASES = list(itertools.product([False, True], [False, True], [False, True]))


def arguments(anchored: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = normal(0, 7, 5) if columns else normal(0, 5, 7)
    return weight.requires_grad_(), normal(1, 7, 3).requires_grad_(), normal(2, 7, 2) if anchored else None


def dense(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    q = dense_q(vectors, apply_GS=apply_GS, anchor=anchor)
    return q.mT @ weight.double() if columns else (weight.double().flatten(1) @ q).view(weight.shape)


@pytest.mark.parametrize(("anchored", "apply_GS", "columns"), CASES)
def test_it_is_the_dense_product_with_two_derivatives(anchored: bool, apply_GS: bool, columns: bool) -> None:
    weight, vectors, anchor = arguments(anchored, columns)
    made = ROTATE(weight, vectors, anchor, apply_GS, columns)
    wanted = dense(weight, vectors, anchor, apply_GS, columns)
    assert made.is_contiguous()
    assert relative_error(made, wanted) < 1e-14
    derivatives = []
    for value in (made, wanted):
        upstream = value.mul(normal(3, *weight.shape)).sin().sum()
        first = torch.autograd.grad(upstream, (weight, vectors), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (weight, vectors))
        derivatives.append((*first, *second))
    for ours, theirs in zip(*derivatives, strict=True):
        assert relative_error(ours, theirs) < 1e-10


def test_vectors_of_no_length_turn_nothing_and_huge_or_tiny_ones_overflow_nothing() -> None:
    weight = normal(0, 5, 7, dtype=torch.float32)
    vectors = normal(1, 7, 3, dtype=torch.float32) * torch.tensor([0.0, 1e25, 1e-25])
    vectors.requires_grad_()
    made = ROTATE(weight, vectors, None, False, False)
    assert relative_error(made, dense(weight, vectors, None, False, False)) < 1e-6
    made.sum().backward()
    assert vectors.grad is not None
    assert bool(torch.isfinite(vectors.grad).all())


@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_bfloat16_weight_is_rotated_in_float32(apply_GS: bool) -> None:
    weight, vectors = normal(0, 40, 64, dtype=torch.bfloat16), normal(1, 64, 5, dtype=torch.float32).requires_grad_()
    made = ROTATE(weight, vectors, None, apply_GS, False)
    wanted = dense(weight, vectors, None, apply_GS, False)
    assert made.dtype == torch.bfloat16
    # Not a bit more than rounding the exact weight costs.
    assert relative_error(made, wanted) < 1.01 * relative_error(wanted.to(torch.bfloat16), wanted)
    (grad,) = torch.autograd.grad(made, vectors, torch.ones_like(made))
    (exact,) = torch.autograd.grad(wanted, vectors, torch.ones_like(wanted))
    assert grad.dtype == torch.float32
    assert relative_error(grad, exact) < 1e-5


def test_autocast_changes_nothing_of_it() -> None:
    weight, vectors = normal(0, 40, 64, dtype=torch.float32), normal(1, 64, 5, dtype=torch.float32)
    plain = ROTATE(weight, vectors, None, True, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ROTATE(weight, vectors, None, True, False), plain)


@pytest.mark.parametrize(
    ("anchored", "apply_GS", "columns"), [(False, False, True), pytest.param(True, True, False, marks=pytest.mark.slow)]
)
# torch reads the gradient of a copy, and hides its warning only where warnings are not errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_finds_the_operator_well_defined(anchored: bool, apply_GS: bool, columns: bool) -> None:
    """Schema, fake kernel, autograd registration, and the joint graph of torch.compile."""
    torch.library.opcheck(ROTATE, (*arguments(anchored, columns), apply_GS, columns))
