"""Measures one adapter at one layer: its rotation angles, and how much they change the weight."""

from __future__ import annotations

import math

from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.rotated_energy import WeightChange, readable_rows, weight_change
from hra_fx.functional.statistics import RotationStats, rotation_stats
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts_adapters import ExpertsAdapters
from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.layers.quantized.scheme import QuantScheme

_UNKNOWN = RotationStats(math.nan, (math.nan,), math.nan)


def turn_of(chain: Tensor | None) -> RotationStats:
    """The angles of the reflections of `chain_of`, NaN for `None`; of experts, those of all together."""
    if chain is None:
        return _UNKNOWN
    return rotation_stats(chain) if chain.dim() == 2 else _joint([rotation_stats(one) for one in chain])


def _joint(experts: list[RotationStats]) -> RotationStats:
    """The statistics of `Q` of all experts together, a block-diagonal matrix."""
    angles = sorted((angle for expert in experts for angle in expert.angles), reverse=True)
    norms = (math.hypot(*(getattr(expert, name) for expert in experts)) for name in ("rotation", "orthogonality"))
    rotation, orthogonality = norms
    return RotationStats(rotation, tuple(angles), orthogonality)


def change_of(rows: Tensor | None, chain: Tensor | None) -> WeightChange:
    """How much the reflections change the weight of `weight_rows`, NaN if one of them is `None`."""
    if rows is None or chain is None:
        return WeightChange(math.nan, math.nan)
    if chain.dim() == 2:
        return weight_change(rows, chain)
    sizes = [float(expert.double().square().sum()) for expert in rows]
    changes = [weight_change(expert, own) for expert, own in zip(rows, chain, strict=True)]
    total = sum(sizes)
    if not total:
        return WeightChange(0.0, 0.0)
    share = sum(size * one.share for size, one in zip(sizes, changes, strict=True)) / total
    change = sum(size * one.change**2 for size, one in zip(sizes, changes, strict=True)) / total
    return WeightChange(share, math.sqrt(change))


def chain_of(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """The reflection vectors of an adapter at its strength, `(d, k)`; `None` if they have no data, or are shards.

    Those of experts are `(experts, d, k)`.
    """
    vectors = layer.hra_u[adapter]
    whole = type(vectors.data) is Tensor and vectors.shape == layer.hra_u.vectors_shape(layer.hra_u.specs[adapter].r)
    return layer.hra_u.chain(adapter).detach() if whole and not vectors.is_meta else None


def weight_rows(layer: AdaptedLayer) -> Tensor | None:
    """The base weight of a layer, before any merge, as `(out, d)`; `None` if it cannot be read."""
    try:
        weight = layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged
    except AdapterError:  # parametrized or removed since
        return None
    if weight.is_meta:
        return None
    packing = quant_scheme_of(layer)
    if packing is None and isinstance(layer.hra_u, ExpertsAdapters):
        return layer.hra_u.rows(weight)
    if packing is None:
        return readable_rows(weight, layer.hra_u.width, columns=layer.hra_u.columns)
    return _dequantized(layer, packing)


def _dequantized(layer: AdaptedLayer, packing: QuantScheme) -> Tensor | None:
    """A quantized weight as `(out, d)`; `None` if its library cannot dequantize it here."""
    try:
        values = packing.values(layer)
    except Exception:  # each library has its own errors for a missing kernel; the report goes on without the value
        return None
    return readable_rows(values, layer.hra_u.width, columns=False)
