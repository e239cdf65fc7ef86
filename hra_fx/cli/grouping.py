"""Layers that differ in a number only, as one line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hra_fx.cli.inspect_model import SiteLook
from hra_fx.cli.paths import starred


@dataclass(frozen=True)
class Group:
    """Some layers of a kind; a star stands for the numbers in which their paths differ."""

    path: str
    site: str
    d: int
    count: int
    parameters: int


def grouped(layers: Iterable[SiteLook]) -> list[Group]:
    """The layers by path, kind and shape, in the order in which each first comes."""
    groups: dict[tuple[str, str, int], list[SiteLook]] = {}
    for layer in layers:
        groups.setdefault((starred(layer.path), layer.site, layer.d), []).append(layer)
    return [
        # One that is alone keeps its number.
        Group(path if len(found) > 1 else found[0].path, site, d, len(found), sum(layer.parameters for layer in found))
        for (path, site, d), found in groups.items()
    ]
