"""Integrations with transformers, diffusers and PEFT.

The Trainer and its callbacks are imported when they are first used, because they need accelerate, which is not a
dependency of hra_fx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hra_fx.removed import raise_if_removed

if TYPE_CHECKING:
    from hra_fx.integrations.trainer import (
        HRATrainer as HRATrainer,
        PairCallback as PairCallback,
        ProtectCallback as ProtectCallback,
    )

_HOMES = {
    "HRATrainer": "trainer",
    "PairCallback": "trainer",
    "ProtectCallback": "trainer",
}
__all__ = ["HRATrainer", "PairCallback", "ProtectCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise_if_removed(f"integrations.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
