"""The change of one matrix as a product of two thin ones, with the checks before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional import low_rank
from hra_fx.layers.adapters import HouseholderAdapters


def change_of(path: str, rows: Tensor, chain: Tensor, noise: float, rank: int | None) -> low_rank.WeightChange:
    """`W Q - W = B A` of a weight.

    Args:
        path: the path of the layer, for messages.
        rows: `W: (out, d)`.
        chain: `U: (d, k)`.
        noise: see `noise_of`.
        rank: the largest rank, or `None`.

    Raises:
        AdapterError: the weight or the vectors are not finite.
    """
    _check_finite(path, chain)
    V, K = low_rank.core(chain, noise)
    projected = low_rank.project(rows, V)
    _check_finite(path, projected)
    return low_rank.weight_change(projected, V, K, rank)


def noise_of(box: HouseholderAdapters, names: Sequence[str]) -> float:
    """How far the `Q` of fresh adapters may be from the identity."""
    anchored = [box[name] for name in names if box.specs[name].apply_GS and box.anchor(name) is not None]
    return sum(low_rank.anchor_noise(vectors.shape[-1], vectors.dtype) for vectors in anchored)


def _check_finite(path: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"{path}: its weight or its vectors have NaN or infinite values. Load or train it again.")
