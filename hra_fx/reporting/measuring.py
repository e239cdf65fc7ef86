"""The numbers of an adapter at a layer: how far it turns, and how much of the weight it gets hold of."""

from __future__ import annotations

import math

from torch import Tensor

from hra_fx.errors import AdapterError
from hra_fx.functional.statistics import RotationStats, rotation_stats
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.quantized.scheme import Packing
from hra_fx.model.rotated_share import readable_rows, share_turned

_UNKNOWN = RotationStats(math.nan, (math.nan,), math.nan)


def turn_of(chain: Tensor | None) -> RotationStats:
    """What the reflections of `chain_of` do; NaN where there are none to read."""
    return _UNKNOWN if chain is None else rotation_stats(chain)


def share_of(rows: Tensor | None, chain: Tensor | None) -> float:
    """Which share of the weight of `weight_rows` the reflections turn; NaN where one of them cannot be read."""
    return math.nan if rows is None or chain is None else share_turned(rows, chain)


def chain_of(layer: SiteCarrier, adapter: str) -> Tensor | None:
    """The reflections of an adapter at its strength, `(d, k)`; `None` where this process holds a shard of them only."""
    vectors = layer.hra_u[adapter]
    whole = type(vectors.data) is Tensor and vectors.shape == (layer.hra_u.width, layer.hra_u.specs[adapter].r)
    return layer.hra_u.chain(adapter).detach() if whole else None


def weight_rows(layer: SiteCarrier) -> Tensor | None:
    """The weight of a layer as it was before any merge, `(out, d)`; `None` for one that cannot be read."""
    try:
        weight = layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged
    except AdapterError:  # another tool computes it from other parameters by now
        return None
    packing = packing_of(layer)
    if packing is None:
        return readable_rows(weight, layer.hra_u.width, columns=layer.hra_u.columns)
    return _dequantised(layer, packing)


def _dequantised(layer: SiteCarrier, packing: Packing) -> Tensor | None:
    """What a quantised weight stands for, `(out, d)`; `None` where its library cannot say it."""
    try:
        values = packing.values(layer)
    except Exception:  # each has errors of its own for a kernel that is not there, and a report goes on without it
        return None
    return readable_rows(values, layer.hra_u.width, columns=False)
