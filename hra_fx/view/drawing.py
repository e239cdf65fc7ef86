"""All that the writers of pictures and pages are given: the graph of a model, and what its adapters did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx, nn

from hra_fx.adapted import sites_of
from hra_fx.graphing import graphs
from hra_fx.reporting import Row, report
from hra_fx.view.graph import adapted_graph
from hra_fx.view.scopes import scope_tree
from hra_fx.view.tree import Scope


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a model.

    Attributes:
        name: the class of the model.
        title: the heading, `"ResNet with HRA"`.
        facts: one line: how many sites, their ranks and parameters, how the model was captured.
        picture: the leaves and the flow of values between them; see `graph.adapted_graph`.
        rows: the rows of the report; none for a plain model.
        missed: path of a layer that could carry reflections, and does not -> why; none for a plain model.
    """

    name: str
    title: str
    facts: str
    picture: nx.DiGraph[str]
    rows: tuple[Row, ...]
    missed: Mapping[str, str]

    def tree(self) -> Scope:
        """The leaves grouped by module, with neighbours that look alike as one."""
        return scope_tree(self.picture, self.name)


def drawing_of(model: nn.Module, example_inputs: Any = None) -> Drawing:
    """Look at a model.

    Args:
        model: one that went through `hra_fx.transform`.
        example_inputs: those of one call, for a whole graph by TorchDynamo where fx has none.
    """
    regions = graphs(model, example_inputs)
    name = type(model).__name__
    picture = adapted_graph(model, regions)
    return Drawing(name, f"{name} with HRA", facts(model, regions), picture, report(model).rows, {})


def facts(model: nn.Module, regions: Mapping[str, fx.GraphModule]) -> str:
    """One line: how many sites, their ranks and parameters, how the model was captured."""
    boxes = [layer.hra_u for layer in sites_of(model).values()]
    ranks = sorted({sum(box[name].shape[1] for name in box.active) for box in boxes})
    adapter = sum(parameter.numel() for box in boxes for parameter in box.parameters())
    base = sum(parameter.numel() for parameter in model.parameters()) - adapter
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    alone = len(regions.keys() & sites_of(model).keys())
    parts = (_number(len(regions) - alone, "captured region"), f"{_number(alone, 'layer')} alone")
    captured = "captured whole" if "" in regions else ", ".join(parts)
    words = f"{_number(len(boxes), 'adapted layer')} · r = {span} · {adapter:,} adapter parameters"
    return f"{words} ({adapter / max(base, 1):.2%} of {base:,}) · {captured}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
