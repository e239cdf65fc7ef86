"""Integrations with transformers, diffusers and PEFT.

The Trainer and its callbacks are imported when they are first used, because they need accelerate, which is not a
dependency of hra_fx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hra_fx.integrations.rotation import RotationCallback as RotationCallback
    from hra_fx.integrations.trainer import (
        HRATrainer as HRATrainer,
        PairCallback as PairCallback,
        ProtectCallback as ProtectCallback,
    )

_HOMES = {
    "HRATrainer": "trainer",
    "PairCallback": "trainer",
    "ProtectCallback": "trainer",
    "RotationCallback": "rotation",
}
__all__ = ["HRATrainer", "PairCallback", "ProtectCallback", "RotationCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
