"""Group layers whose paths differ only in a number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hra_fx.cli.inspect_model import LayerSummary
from hra_fx.cli.paths import starred


@dataclass(frozen=True)
class Group:
    """Layers of one type and shape; `path` has stars instead of numbers."""

    path: str
    site: str
    d: int
    count: int
    parameters: int


def grouped(layers: Iterable[LayerSummary]) -> list[Group]:
    """Groups of layers by path, type and shape, in order of first appearance."""
    groups: dict[tuple[str, str, int], list[LayerSummary]] = {}
    for layer in layers:
        groups.setdefault((starred(layer.path), layer.site, layer.d), []).append(layer)
    return [
        # A single layer keeps its number.
        Group(path if len(found) > 1 else found[0].path, site, d, len(found), sum(layer.parameters for layer in found))
        for (path, site, d), found in groups.items()
    ]
