"""Layers that can be adapted: described, sorted and grouped by their paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LayerSummary:
    """A layer that can be adapted; `d` is the length of its vectors, `r` their number in a configuration.

    `trained` is the number of adapter parameters: `d * r`, for each expert.
    """

    path: str
    site: str
    d: int
    parameters: int
    r: int | None = None
    trained: int = 0


@dataclass(frozen=True)
class Group:
    """Layers of one type, shape and rank; `path` has stars instead of numbers."""

    path: str
    site: str
    d: int
    count: int
    parameters: int
    r: int | None
    trained: int


def summarize_layer(path: str, layer: nn.Module, r: int | None = None) -> LayerSummary:
    """Describe a layer that can be adapted."""
    from hra_fx.layers.target import describe, weight_place, width_of
    from hra_fx.layers.variants import adapters_for

    owner, name = weight_place(layer)
    weight = owner._parameters[name]
    trained = math.prod(adapters_for(layer).vectors_shape(r)) if r else 0
    return LayerSummary(path, describe(layer), width_of(layer), 0 if weight is None else weight.numel(), r, trained)


def grouped(layers: Iterable[LayerSummary]) -> list[Group]:
    """Groups of layers whose paths differ only in a number, by type, shape and rank, in order of first appearance."""
    groups: dict[tuple[str, str, int, int | None], list[LayerSummary]] = {}
    for layer in layers:
        starred = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.path)
        groups.setdefault((starred, layer.site, layer.d, layer.r), []).append(layer)
    return [
        # A single layer keeps its number.
        Group(
            path=path if len(found) > 1 else found[0].path,
            site=site,
            d=d,
            count=len(found),
            parameters=sum(part.parameters for part in found),
            r=r,
            trained=sum(part.trained for part in found),
        )
        for (path, site, d, r), found in groups.items()
    ]


def natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key for paths that compares numbers as numbers.

    >>> sorted(["h.10.q", "h.2.q"], key=natural)
    ['h.2.q', 'h.10.q']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]
