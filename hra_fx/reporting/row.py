"""The numbers of a report: one adapter at one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.rotate import rotate_weight, widest_dtype
from hra_fx.functional.statistics import readable_rows, relative_change, rotation_stats
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts import ExpertsAdapters
from hra_fx.layers.quantized.libraries import quant_scheme_of


@dataclass(frozen=True)
class Row:
    """One adapter at one layer.

    Attributes:
        path: qualified name of the layer.
        layer_type: class and shape of the layer, such as `"Linear 6->8"`.
        adapter: name of the adapter.
        active: whether the adapter is one of the model's active adapters. Disabling all adapters does not change it.
        d: length of a reflection vector.
        r: number of trainable vectors.
        parameters: `d * r`; for experts, `experts * d * r`.
        angle: largest rotation angle of `Q` in radians. It is pi for a reflection, and 0 for the identity.
        mean_angle: mean of the rotation angles in radians, one for each plane that `Q` rotates; a reflected direction
            counts as pi. Angles below the rounding error are left out. 0 for the identity.
        orthogonality: `|Q^T Q - I|_F` of `Q` in the precision of the forward pass.
        weight_change: `|W Q - W|_F / |W|_F`: how much `Q` changes the weight, relative to its size. A quantized weight
            is dequantized first.
        held: the share of the samples of `hra_fx.protect` that the protected directions `V` hold; `None` if it is not
            known, as after loading, or nothing is protected.
        moved: how far `Q` moves the protected directions: `|Q V - V|_F / |V|_F`; `None` if nothing is protected.
        scale: the scale of the adapter (`set_scale`). The measures are those at this scale.

    A measure is `None` if the vectors or the weight have no data, are shards, or cannot be dequantized on this machine,
    and NaN if they are not finite.
    """

    path: str
    layer_type: str
    adapter: str
    active: bool
    d: int
    r: int
    parameters: int
    angle: float | None
    mean_angle: float | None
    orthogonality: float | None
    weight_change: float | None
    held: float | None = None
    moved: float | None = None
    scale: float = 1.0


def measured_fields(chain: Tensor | None, rows: Tensor | None) -> dict[str, float | None]:
    """The measured fields of a row, from `chain_of` and `weight_rows`. `Q` of all experts is block-diagonal."""
    if chain is None:
        return dict.fromkeys(("angle", "mean_angle", "orthogonality", "weight_change"))
    parts = [rotation_stats(one) for one in (chain if chain.dim() == 3 else chain[None])]
    angles = [angle for part in parts for angle in part.angles]
    return {
        "angle": largest([0.0, *angles]),
        "mean_angle": sum(angles) / max(len(angles), 1),
        "orthogonality": math.hypot(*(part.orthogonality for part in parts)),
        "weight_change": None if rows is None else _change_of(rows, chain),
    }


def _change_of(rows: Tensor, chain: Tensor) -> float:
    """The change of a weight, or of those of all experts, which are one matrix."""
    if chain.dim() == 2:
        return relative_change(rows, chain)
    sizes = [float(expert.to(widest_dtype(rows.device)).norm()) for expert in rows]
    changes = [relative_change(expert, own) for expert, own in zip(rows, chain, strict=True)]
    # A weight of zeros does not change.
    return math.hypot(*(size * one for size, one in zip(sizes, changes, strict=True))) / (math.hypot(*sizes) or 1.0)


def moved(basis: Tensor | None, chain: Tensor | None) -> float | None:
    """How far the reflections from `chain_of` move some directions `(..., d, k)`, relative to their size.

    `None` without directions or reflections.
    """
    if basis is None or chain is None or not bool(basis.any()):
        return None
    dtype = widest_dtype(chain.device)
    wide, directions = chain.to(dtype), basis.to(chain.device, dtype)
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
