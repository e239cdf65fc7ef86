"""The change of one matrix on disk as a product of two thin ones: `W V` is computed while the weight is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.rotation import Rotation, product_dtype, project
from hra_fx.checkpoint.disk.stored import FLOATS, StoredTensor
from hra_fx.errors import CheckpointError
from hra_fx.functional.low_rank import core, weight_change


def stored_change(
    parts: Sequence[tuple[StoredTensor, Rotation]], noise: float, rank: int | None, advance: Callable[[int], object]
) -> tuple[Tensor, Tensor, float]:
    """`W Q - W = B A` of a weight in one or several tensors, and the error of the approximation if `rank` limits it.

    Args:
        parts: the tensors with rows of `W`, in order, and their rotation, which is the same.
        noise: see `hra_fx.functional.low_rank.core`.
        rank: the largest rank. `None`: no limit.
        advance: called with numbers of bytes, for a progress bar.

    Raises:
        CheckpointError: a weight is not finite, or its file is too short.
    """
    V, K = core(parts[0][1].chain.double(), noise)
    products = [_product(stored, rotation.columns, V, len(K) > 0, advance) for stored, rotation in parts]
    return weight_change(torch.cat(products, dim=1).mT.double(), V, K, rank)


def _product(stored: StoredTensor, columns: bool, V: Tensor, changes: bool, advance: Callable[[int], object]) -> Tensor:
    """`V^T W^T: (k, out)`; a weight that does not change is not read."""
    left = V.mT.to(product_dtype(FLOATS[stored.dtype])).contiguous()
    if not changes:
        product = left.new_zeros(0, stored.shape[1 if columns else 0])
    else:
        product = project(left, stored.read().flatten(1), columns=columns)
    advance(stored.size)
    if not bool(torch.isfinite(product).all()):
        raise CheckpointError(
            f"{stored.file}: {stored.name} has values that are infinite, NaN, or too large for products in "
            f"{product.dtype}. Download the base model again, or store it in a wider dtype."
        )
    return product
