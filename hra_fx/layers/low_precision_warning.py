"""Warn about vectors that are trained in 16 bits, for example after `model.bfloat16()` or a cast by TRL's trainers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from weakref import WeakSet

from hra_fx.errors import HRAWarning
from hra_fx.functional.chain import ChainPart
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.partitioned import is_trained_by_zero
from hra_fx.layers.sharding import sharded_by

_WARNED: WeakSet[HouseholderAdapters] = WeakSet()


def warn_of_low_precision(groups: Iterable[Sequence[tuple[HouseholderAdapters, Sequence[ChainPart]]]]) -> None:
    """Warn, once for each model, if 16-bit vectors are trained.

    For `r=8`, entries start at values up to 0.35. At this size, bfloat16 values are 1e-3 apart, and AdamW changes
    entries by about the learning rate. ZeRO and FSDP may keep float32 values elsewhere, so their vectors are ignored.

    Args:
        groups: layers with the parts of their chains, with one dtype in each group.

    Warns:
        HRAWarning: 16-bit vectors are trained.
    """
    found = [
        (adapters, part.vectors)
        for group in groups
        if any(part.vectors.dtype.itemsize < 4 for part in group[0][1])
        for adapters, parts in group
        for part in parts
        if part.vectors.dtype.itemsize < 4 and part.vectors.requires_grad and adapters.training
    ]
    containers = [one for one, vectors in found if not is_trained_by_zero(vectors) and sharded_by(one) is None]
    if containers and _WARNED.isdisjoint(containers):
        _WARNED.update(containers)
        warnings.warn(
            f"{containers[0].layer_path}: its trained vectors are {found[0][1].dtype}, so rounding cancels most "
            "optimizer steps at usual learning rates. Train them in float32, even in a 16-bit or quantized model. "
            "Before training, and after all casts (TRL's trainers cast them), set "
            "parameter.data = parameter.data.float() for each parameter with 'hra_u' in its name.",
            HRAWarning,
            stacklevel=2,
        )
