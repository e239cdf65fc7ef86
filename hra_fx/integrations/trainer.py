"""The home of `HRATrainer` and two callbacks in 0.4. Their errors say what to use instead."""

from __future__ import annotations

from hra_fx.removed import raise_if_removed


def __getattr__(name: str) -> object:
    raise_if_removed(f"integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
