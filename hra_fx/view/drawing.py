"""The data of every picture and page: the graph of a model, and the report on its adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
from torch import nn

from hra_fx.model.peft_view import adapted_view
from hra_fx.model.state import adapted_layers, unwrap
from hra_fx.reporting.heat import is_identity
from hra_fx.reporting.report import Report, report
from hra_fx.view.scopes import scope_tree
from hra_fx.view.sketch import sketch_of
from hra_fx.view.tree import Leaf, Scope, prefixes


@dataclass(frozen=True)
class Drawing:
    """The data for drawing a model."""

    name: str  # the class of the model
    title: str  # such as "ResNet with HRA"
    facts: str  # one line: the number of adapted layers, their ranks and parameters, and what was traced
    picture: nx.DiGraph[str]  # the leaves, and the flow of values between them; see `graph.leaves_of`
    report: Report  # empty for a plain model

    def tree(self) -> Scope:
        """The leaves grouped by module, with identical neighbors as one item."""
        return scope_tree(self.picture, self.name)


def drawing_of(model: Any, example_inputs: Any = None) -> Drawing:
    """Collect the data for drawing a model, which is not changed; see `visualize`. A wrapper (DDP) is removed."""
    with adapted_view(model) as adapted:
        model = unwrap(adapted)
        found = report(model) if _has_adapters(model) else None
        name, facts, picture = sketch_of(model, example_inputs)
    if found is None:
        return Drawing(name, name, facts, picture, Report(()))
    _mark(picture, found)
    facts += " · not trained yet (identity)" * is_identity(found.rows)
    return Drawing(name, f"{name} with HRA", facts, picture, found)


def _has_adapters(model: Any) -> bool:
    """Whether anything in a model is adapted."""
    return isinstance(model, nn.Module) and bool(adapted_layers(model))


def _mark(picture: nx.DiGraph[str], found: Report) -> None:
    """Record at each leaf the layers without an adapter that it represents."""
    skipped = {layer.path: layer for layer in found.skipped}
    layers = dict.fromkeys((*skipped, *found.trained_in_full))
    below: dict[str, list[str]] = {}  # path of a module -> the layers that it is or contains
    for path in layers:
        for module in prefixes(path):
            below.setdefault(module, []).append(path)
    leaves: dict[str, Leaf] = dict(picture.nodes(data="leaf"))
    for key, leaf in leaves.items():
        # A graph of operators does not have boxes for modules, so a layer is shown where its parameters are read.
        paths = [path for own in leaf.paths for path in below.get(own, ())]
        paths = list(dict.fromkeys([*paths, *(path for path in leaf.readers if path in layers)]))
        here = tuple(skipped[path] for path in paths if path in skipped)
        full = tuple(path for path in paths if path not in skipped)
        picture.nodes[key]["leaf"] = replace(leaf, skipped=here, trained=full)
