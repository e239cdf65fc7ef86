"""Integrations with transformers, diffusers and PEFT."""

from __future__ import annotations

from hra_fx.removed import raise_if_removed

__all__: list[str] = []


def __getattr__(name: str) -> object:
    raise_if_removed(f"integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
