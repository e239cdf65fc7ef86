"""Statistics of the rotation at one training step: a few values per adapter that are cheap enough to log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hra_fx.functional.statistics import RotationStats
from hra_fx.model.state import require_adapted_layers
from hra_fx.reporting.heat import largest
from hra_fx.reporting.row import chain_of, turn_of


@dataclass(frozen=True)
class Progress:
    """One adapter at one step.

    Attributes:
        step: number of optimizer steps so far.
        adapter: name of the adapter.
        mean_angle: mean of the mean angles of its layers, in radians (see `hra_fx.reporting.row.Row`).
        angle: largest angle of all its layers, in radians.
        orthogonality: largest `|Q^T Q - I|_F` of all its layers.
    """

    step: int
    adapter: str
    mean_angle: float
    angle: float
    orthogonality: float


def progress_of(model: nn.Module, step: int) -> list[Progress]:
    """The progress of each active adapter. This does not read weights.

    Args:
        model: a transformed model; may be wrapped (DDP, `torch.compile`).
        step: the step to store in the entries.

    Raises:
        AdapterError: the model has no adapters.
    """
    turns: dict[str, list[RotationStats]] = {}
    with torch.no_grad():
        for layer in require_adapted_layers(model).values():
            for name in layer.hra_u.active:
                turns.setdefault(name, []).append(turn_of(chain_of(layer, name)))
    return [
        Progress(
            step,
            adapter,
            sum(turn.mean_angle for turn in found) / len(found),
            largest(turn.angle for turn in found),
            largest(turn.orthogonality for turn in found),
        )
        for adapter, found in turns.items()
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only shards of some vectors (FSDP, ZeRO-3), so that angles cannot be computed.

    Raises:
        AdapterError: the model has no adapters.
    """
    return any(
        chain_of(layer, name) is None for layer in require_adapted_layers(model).values() for name in layer.hra_u
    )


def adapters_in(history: Sequence[Progress]) -> list[str]:
    """The names of the adapters, in the order of a history."""
    return list(dict.fromkeys(point.adapter for point in history))
