"""Measures one adapter at one layer: its rotation angles, and the share of the weight that they change."""

from __future__ import annotations

import math

from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.rotated_energy import readable_rows, rotated_energy
from hra_fx.functional.statistics import RotationStats, rotation_stats
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.layers.quantized.scheme import QuantScheme

_UNKNOWN = RotationStats(math.nan, (math.nan,), math.nan)


def turn_of(chain: Tensor | None) -> RotationStats:
    """The angles of the reflections of `chain_of`, NaN for `None`."""
    return _UNKNOWN if chain is None else rotation_stats(chain)


def share_of(rows: Tensor | None, chain: Tensor | None) -> float:
    """The share of the weight of `weight_rows` that the reflections change, NaN if one of them is `None`."""
    return math.nan if rows is None or chain is None else rotated_energy(rows, chain)


def chain_of(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """The reflection vectors of an adapter at its strength, `(d, k)`; `None` if this process holds only a shard."""
    vectors = layer.hra_u[adapter]
    whole = type(vectors.data) is Tensor and vectors.shape == (layer.hra_u.width, layer.hra_u.specs[adapter].r)
    return layer.hra_u.chain(adapter).detach() if whole else None


def weight_rows(layer: AdaptedLayer) -> Tensor | None:
    """The base weight of a layer, before any merge, as `(out, d)`; `None` if it cannot be read."""
    try:
        weight = layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged
    except AdapterError:  # parametrized or removed since
        return None
    packing = quant_scheme_of(layer)
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
