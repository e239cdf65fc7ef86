"""The numbers of a report: one adapter at one layer, and a few values per adapter that are cheap enough to log."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.rotate import rotate_weight
from hra_fx.functional.statistics import RelativeChange, RotationStats, readable_rows, relative_change, rotation_stats
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts import ExpertsAdapters
from hra_fx.layers.quantized import quant_scheme_of


@dataclass(frozen=True)
class Row:
    """One adapter at one layer.

    Values that cannot be computed (because vectors have no data or are not finite) are NaN.

    Attributes:
        path: qualified name of the layer.
        layer_type: class and shape of the layer, such as `"Linear 6->8"`.
        adapter: name of the adapter.
        active: whether the adapter is one of the model's active adapters. Disabling all adapters does not change it.
        d: length of a reflection vector.
        r: number of trainable vectors.
        parameters: `d * r`; for experts, `experts * d * r`.
        rotation: `|Q - I|_F`.
        angle: largest rotation angle of `Q` in radians. It is pi for a reflection, and 0 for the identity.
        mean_angle: mean of `angles` in radians, 0 for the identity.
        angles: rotation angle of each plane that `Q` rotates, in radians from 0 to pi, in descending order. A single
            reflected direction counts as one angle of pi. Angles below the rounding error are left out.
        orthogonality: `|Q^T Q - I|_F` of `Q` in the precision of the forward pass.
        share: share of the weight that `Q` changes: `|W P|_F^2 / |W|_F^2`, where `P` is the projector on the directions
            that `Q` changes. A quantized weight is dequantized first. NaN if the weight cannot be read (it has no data,
            is sharded, or its library cannot dequantize it on this machine).
        weight_change: `|W Q - W|_F / |W|_F`: how much `Q` changes the weight, relative to its size. NaN as for `share`.
        bytes: memory of the vectors.
        bytes_here: memory of the vectors in this process, which is less if they are sharded.
        held: the share of the samples of `hra_fx.protect` that the protected directions `V` hold; `None` if it is not
            known, as after loading, or nothing is protected.
        moved: how far `Q` moves the protected directions: `|Q V - V|_F / |V|_F`; `None` if nothing is protected.
        scale: the scale of the adapter (`set_scale`). The measures are those at this scale.
    """

    path: str
    layer_type: str
    adapter: str
    active: bool
    d: int
    r: int
    parameters: int
    rotation: float
    angle: float
    mean_angle: float
    angles: tuple[float, ...]
    orthogonality: float
    share: float
    weight_change: float
    bytes: int = 0
    bytes_here: int = 0
    held: float | None = None
    moved: float | None = None
    scale: float = 1.0


def measured_fields(chain: Tensor | None, rows: Tensor | None) -> dict[str, Any]:
    """The measured fields of a row, from `chain_of` and `weight_rows`; NaN without them. Experts are one matrix."""
    if chain is None:
        found = RotationStats(math.nan, (math.nan,), math.nan)
    else:  # `Q` of all experts is block-diagonal
        parts = [rotation_stats(one) for one in (chain if chain.dim() == 3 else chain[None])]
        angles = sorted((angle for part in parts for angle in part.angles), reverse=True)
        size, error = (
            math.hypot(*norms) for norms in zip(*((one.rotation, one.orthogonality) for one in parts), strict=True)
        )
        found = RotationStats(size, tuple(angles), error)
    share, change = (math.nan, math.nan) if rows is None or chain is None else _change_of(rows, chain)
    middle = {"angle": found.angle, "mean_angle": found.mean_angle}
    return {**found._asdict(), **middle, "share": share, "weight_change": change}


def _change_of(rows: Tensor, chain: Tensor) -> RelativeChange:
    if chain.dim() == 2:
        return relative_change(rows, chain)
    sizes = [float(expert.double().square().sum()) for expert in rows]
    changes = [relative_change(expert, own) for expert, own in zip(rows, chain, strict=True)]
    total = sum(sizes) or 1.0  # a weight of zeros does not change
    share = sum(size * one.share for size, one in zip(sizes, changes, strict=True)) / total
    change = sum(size * one.change**2 for size, one in zip(sizes, changes, strict=True)) / total
    return RelativeChange(share, math.sqrt(change))


def moved(basis: Tensor | None, chain: Tensor | None) -> float | None:
    """How far the reflections from `chain_of` move some directions `(..., d, k)`, relative to their size.

    `None` without directions or reflections.
    """
    if basis is None or chain is None or not bool(basis.any()):
        return None
    wide, directions = chain.double(), basis.to(chain.device, torch.float64)
    turned = rotate_weight(directions.mT, wide).mT  # rows `v^T Q^T`, for which `|Q^T v - v| = |Q v - v|`
    return float((turned - directions).norm() / directions.norm())


def chain_of(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """The reflection vectors of an adapter at its scale, `(d, k)`, or `(experts, d, k)` for experts.

    `None` if they have no data or are shards.
    """
    vectors = layer.hra_u[adapter]
    whole = type(vectors.data) is Tensor and vectors.shape == layer.hra_u.parameter_shape(adapter)
    return layer.hra_u.chain(adapter).detach() if whole and not vectors.is_meta else None


def weight_rows(layer: AdaptedLayer) -> Tensor | None:
    """The base weight of a layer, before any merge, as `(out, d)`; `None` if it cannot be read."""
    try:
        weight = layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged
    except AdapterError:  # it was parametrized or removed later
        return None
    if weight.is_meta:
        return None
    scheme = quant_scheme_of(layer)
    if scheme is None and isinstance(layer.hra_u, ExpertsAdapters):
        return layer.hra_u.rows(weight)
    if scheme is None:
        return readable_rows(weight, layer.hra_u.width, fan_in_fan_out=layer.hra_u.fan_in_fan_out)
    try:
        values = scheme.values(layer)
    except Exception:  # each library has its own errors for a missing kernel; the report continues without the value
        return None
    return readable_rows(values, layer.hra_u.width, fan_in_fan_out=False)


def largest(values: Iterable[float]) -> float:
    """The largest of at least one value, or NaN if one is NaN (which `max` may miss).

    >>> largest([1.0, 3.0]), largest([1.0, math.nan])
    (3.0, nan)
    """
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)
