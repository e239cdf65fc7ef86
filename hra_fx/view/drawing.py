"""All that the writers of pictures and pages are given: the graph of a model, and what its adapters did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx

from hra_fx.model.unwrap import unwrap
from hra_fx.reporting import Row, report
from hra_fx.view.graph import leaves_of
from hra_fx.view.resolve_subject import find_subject, has_reflections
from hra_fx.view.scopes import scope_tree
from hra_fx.view.subject import Subject
from hra_fx.view.tree import Scope


@dataclass(frozen=True)
class Drawing:
    """What is drawn of a model.

    Attributes:
        name: the class of the model.
        title: the heading, `"ResNet with HRA"`.
        facts: one line: how many sites, their ranks and parameters, how the model was captured.
        picture: the leaves and the flow of values between them; see `graph.leaves_of`.
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


def drawing_of(model: Any, example_inputs: Any = None) -> Drawing:
    """Look at a model; nothing in it is changed.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`; in
            what wraps a whole model (DDP, `torch.compile`), that model is looked at.
        example_inputs: those of one call: for shapes, and for a whole graph by TorchDynamo where fx has none.

    Raises:
        VisualizeError: it is no model, or has no use for example inputs.
        AdapterError: the model does not run on the inputs, or TorchDynamo cannot record the call.
    """
    model = unwrap(model)
    found = report(model) if has_reflections(model) else None
    subject = find_subject(model, example_inputs, found.rows if found else ())
    name = subject.classes.get("", type(model).__name__)
    return Drawing(
        name=name,
        title=f"{name} with HRA" if found else name,
        facts=_facts(subject),
        picture=leaves_of(subject),
        rows=found.rows if found else (),
        missed={layer.path: layer.reason for layer in found.missed} if found else {},
    )


def _facts(subject: Subject) -> str:
    if not subject.sites:
        return f"{subject.parameters:,} parameters · no adapters · {_captured(subject)}"
    ranks = sorted({site.rank for site in subject.sites.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    adapter = sum(site.vectors for site in subject.sites.values())
    share = adapter / max(subject.parameters, 1)
    words = f"{_number(len(subject.sites), 'adapted layer')} · r = {span} · {adapter:,} adapter parameters"
    return f"{words} ({share:.2%} of {subject.parameters:,}) · {_captured(subject)}"


def _captured(subject: Subject) -> str:
    """In what graphs the model is drawn."""
    if subject.of_call:
        return "graph of one call" if "" in subject.graphs else f"one call in {len(subject.graphs)} graphs"
    if "" in subject.graphs:
        return "captured whole"
    alone = len(subject.graphs.keys() & subject.sites.keys())
    regions = len(subject.graphs) - alone
    words = [_number(regions, "captured region")] * bool(regions) + [f"{_number(alone, 'layer')} alone"] * bool(alone)
    return ", ".join(words) or "no part captured"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
