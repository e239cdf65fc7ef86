"""What a picture is made of: captured graphs, the modules around them, and the sites in them, from wherever."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from hra_fx.functional.statistics import rotation_stats
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.sharding import is_shard
from hra_fx.model.state import Record, record_of, sites_of
from hra_fx.reporting import Row
from hra_fx.view.describe import describe_module, own_parameters


@dataclass(frozen=True)
class SiteFacts:
    """What a box says of a site.

    Attributes:
        detail: class and shape of the layer.
        width: length `d` of its vectors.
        rank: how many are in use, adapters together; those that are merged into the weight are.
        rotation: `|Q - I|_F` of the product in use, `None` where that cannot be computed, or none is.
        parameters: how many numbers the layer itself holds.
        vectors: how many all of its adapters hold.
    """

    detail: str
    width: int
    rank: int
    rotation: float | None
    parameters: int
    vectors: int


@dataclass(frozen=True)
class Subject:
    """A model to be drawn.

    Attributes:
        model: the modules by name; of a program, those that its names tell of.
        graphs: module path -> captured graph; `"call[0]"`, ... for the pieces of a call.
        sites: path -> facts, for each site once.
        aliases: another path of a site -> its first one.
        classes: module path -> name of the class.
        parameters: how many numbers the model holds, without its adapters.
        of_call: whether the graphs are TorchDynamo's, of one call.
    """

    model: nn.Module
    graphs: Mapping[str, fx.GraphModule]
    sites: Mapping[str, SiteFacts]
    aliases: Mapping[str, str]
    classes: Mapping[str, str]
    parameters: int
    of_call: bool = False


def subject_of(
    model: nn.Module, graphs: Mapping[str, fx.GraphModule], rows: Iterable[Row] = (), *, of_call: bool = False
) -> Subject:
    """A model with graphs that were captured of it; it may be a plain one.

    Args:
        model: the model.
        graphs: module path -> captured graph.
        rows: those of the model's report, where they are known; what they tell is not computed again.
        of_call: whether they are TorchDynamo's, of one call.
    """
    sites = sites_of(model)
    first = {layer: path for path, layer in sites.items()}
    named = dict(model.named_modules(remove_duplicate=False))
    known = known_rotations(rows)
    record = record_of(model)
    return Subject(
        model=model,
        graphs=graphs,
        sites={path: _facts(layer, known.get(path), record) for path, layer in sites.items()},
        aliases={path: first[part] for path, part in named.items() if part in first},
        classes={path: type(part).__name__ for path, part in named.items()},
        parameters=sum(parameter.numel() for parameter in own_parameters(model)),
        of_call=of_call,
    )


def known_rotations(rows: Iterable[Row]) -> dict[str, float]:
    """Path -> `|Q - I|_F` of the product in use, for the layers with one adapter, which is that."""
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row.path, []).append(row)
    return {path: own[0].rotation for path, own in by_layer.items() if len(own) == 1 and own[0].active}


def _facts(layer: SiteCarrier, known: float | None, record: Record | None) -> SiteFacts:
    reflection = layer.hra_u
    used = _in_use(reflection, record)
    rank = sum(reflection.specs[name].r for name in used)
    rotation = _rotation(reflection, used) if known is None or not used else known
    held = sum(parameter.numel() for parameter in own_parameters(layer))
    vectors = sum(parameter.numel() for parameter in reflection.parameters())
    shown = None if math.isnan(rotation) else rotation
    return SiteFacts(describe_module(layer), reflection.width, rank, shown, held, vectors)


def _in_use(reflection: Reflection, record: Record | None) -> tuple[str, ...]:
    """The adapters that turn the layer, in the order of their product: in its forward, or merged into its weight."""
    if record is None or reflection.unmerged is None:
        return reflection.active
    held = {*reflection.active, *record.merged}
    return tuple(name for name in record.active if name in held and name in reflection)


def _rotation(reflection: Reflection, used: tuple[str, ...]) -> float:
    """`|Q - I|_F` of some adapters; NaN without one, or where it cannot be computed."""
    # What would have to be gathered is not asked for: only one process may be drawing.
    if any(map(is_shard, reflection.parameters())):
        return math.nan
    with torch.no_grad():
        chain = reflection.joint_chain(used)
    return math.nan if chain is None else rotation_stats(chain).rotation
