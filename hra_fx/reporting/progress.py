"""How far a whole model is turned at one moment of a training: few numbers for each adapter, cheap enough for a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hra_fx.functional.statistics import RotationStats
from hra_fx.model.state import require_sites
from hra_fx.reporting.measuring import chain_of, turn_of


@dataclass(frozen=True)
class Progress:
    """One adapter at one step.

    Attributes:
        step: how many optimiser steps were done.
        adapter: name of the adapter.
        mean_angle: the mean over its layers of each layer's mean angle, in radians (see `hra_fx.reporting.Row`).
        angle: the largest angle of all its layers, in radians.
        orthogonality: the largest `|Q^T Q - I|_F` of its layers.
    """

    step: int
    adapter: str
    mean_angle: float
    angle: float
    orthogonality: float


def progress_of(model: nn.Module, step: int) -> list[Progress]:
    """The progress of each active adapter; no weight is read.

    Args:
        model: a transformed model, bare or wrapped (DDP, `torch.compile`).
        step: what the entries are to have as their step.

    Raises:
        AdapterError: the model has no reflections.
    """
    turns: dict[str, list[RotationStats]] = {}
    with torch.no_grad():
        for layer in require_sites(model).values():
            for name in layer.hra_u.active:
                turns.setdefault(name, []).append(turn_of(chain_of(layer, name)))
    return [
        Progress(
            step,
            adapter,
            sum(turn.mean_angle for turn in found) / len(found),
            _largest(turn.angle for turn in found),
            _largest(turn.orthogonality for turn in found),
        )
        for adapter, found in turns.items()
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of some vectors (FSDP, ZeRO-3), so that no angle can be told.

    Raises:
        AdapterError: the model has no reflections.
    """
    return any(chain_of(layer, name) is None for layer in require_sites(model).values() for name in layer.hra_u)


def adapters_in(history: Sequence[Progress]) -> list[str]:
    """The names of the adapters, in the order of a history."""
    return list(dict.fromkeys(point.adapter for point in history))


def _largest(values: Iterable[float]) -> float:
    """The largest number; NaN where one is, which `max` may miss."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)
