"""Rotated weights against the dense product, in all layouts and dtypes; and the errors of folding."""

from __future__ import annotations

import pytest
import torch
from functional.test_householder import quick, seeds
from hypothesis import given, strategies as st
from one_layer import F64, normal
from oracles import dense_product, relative_error

from hra_fx.errors import FoldError
from hra_fx.functional.rotate import check_finite, check_foldable, rotate_weight

SHAPES = [(5, 7), (4, 2, 3, 3), (4, 6, 3), (3, 2, 2, 1, 2)]


@pytest.mark.parametrize("exportable_ops", [False, True])
@quick
@given(st.sampled_from(SHAPES), st.booleans(), st.integers(1, 9), st.integers(-60, 60), seeds)
def test_it_is_the_dense_product_with_its_gradients(
    exportable_ops: bool, shape: tuple[int, ...], transposed: bool, k: int, scale: int, seed: int
) -> None:
    transposed = transposed and len(shape) == 2
    weight = normal(seed, *shape).requires_grad_()
    width = shape[0] if transposed else weight[0].numel()
    vectors = (normal(seed + 1, width, k) * 2.0**scale).requires_grad_()
    q = dense_product(vectors)
    wanted = q.mT @ weight if transposed else (weight.flatten(1) @ q).view(shape)
    rotated = rotate_weight(weight, vectors, transposed=transposed, exportable_ops=exportable_ops)
    assert rotated.is_contiguous()
    assert relative_error(rotated, wanted) < 1e-11
    upstream = normal(seed + 2, *shape)
    for tensor, factor in ((weight, 1.0), (vectors, 2.0**scale)):
        got, sought = (torch.autograd.grad(one, tensor, upstream, retain_graph=True)[0] for one in (rotated, wanted))
        assert relative_error(got * factor, sought * factor, floor=1e-3) < 1e-9


@pytest.mark.parametrize("autocast", [False, True])
def test_a_narrow_weight_is_rotated_in_float32(autocast: bool) -> None:
    weight, vectors = normal(0, 40, 64).bfloat16(), normal(1, 64, 5).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rotated = rotate_weight(weight, vectors)
    wanted = weight.double() @ dense_product(vectors)
    assert rotated.dtype == torch.bfloat16
    assert relative_error(rotated, wanted) < 1.01 * relative_error(wanted.bfloat16(), wanted)


def test_the_wider_dtype_is_used() -> None:
    weight, vectors = normal(0, 5, 7), normal(1, 7, 2).float()
    assert relative_error(rotate_weight(weight, vectors), weight @ dense_product(vectors)) < 1e-14
    assert rotate_weight(weight.float(), vectors.double()).dtype == torch.float32


def test_what_cannot_be_folded_is_refused() -> None:
    weight, vectors = torch.ones(2, 3, dtype=F64), torch.ones(3, 2, dtype=F64)
    check_foldable("fc", weight, vectors, apply_GS=False)
    with pytest.raises(FoldError, match=r"^fc: the weight or the vectors of 'a' are on the meta device\. Load them"):
        check_foldable("fc", weight.to("meta"), vectors, apply_GS=False, adapter="a")
    with pytest.raises(FoldError, match=r"^fc: the vectors are linearly dependent, .* apply_GS=False, or with init_we"):
        check_foldable("fc", weight, vectors, apply_GS=True)
    check_finite("fc", weight)
    with pytest.raises(FoldError, match=r"^fc: the folded weight is not finite\. Check the base weight"):
        check_finite("fc", weight / 0)
