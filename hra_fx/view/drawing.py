"""The data of every picture and page: the graph of a model, the report on its adapters, and the colors of layers."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from hra_fx.compat import fake_tensor_mode
from hra_fx.errors import HRAWarning, VisualizeError
from hra_fx.example_inputs import Call, normalize_inputs
from hra_fx.layers.target import ADAPTER_CHILDREN
from hra_fx.model.graphs import drawn_graph
from hra_fx.model.state import adapted_layers, unwrap
from hra_fx.reporting.columns import MEASURES, is_identity
from hra_fx.reporting.report import Report, report
from hra_fx.reporting.row import Row, largest
from hra_fx.reporting.words import counted
from hra_fx.view.graph import leaves_of
from hra_fx.view.theme import HEAT


@dataclass(frozen=True)
class Drawing:
    """The data for drawing a model."""

    title: str  # such as "ResNet with HRA"
    facts: str  # one line: the number of adapted layers, their ranks and parameters
    picture: nx.DiGraph[str]  # the leaves, and the flow of values between them; see `graph.leaves_of`
    report: Report  # empty for a plain model
    changes: Mapping[str, float]  # adapted layer -> `|W Q - W| / |W|`; NaN if it cannot be computed

    @property
    def largest_change(self) -> float:
        """The end of the color scale; 0 if all layers are unchanged or unknown, so that no colors are shown."""
        return max(filter(math.isfinite, self.changes.values()), default=0.0)

    def color(self, path: str) -> str:
        """The role of the color of a layer, on a common scale from 0."""
        share = self.changes[path] / self.largest_change
        return "unknown" if math.isnan(share) else f"heat{min(int(share * len(HEAT)), len(HEAT) - 1)}"

    def change(self, paths: Sequence[str]) -> str:
        """The mean change of layers as a text; empty if no colors are shown."""
        if not paths or not self.largest_change:
            return ""
        mean = sum(self.changes[path] for path in paths) / len(paths)
        return "mean " * (len(paths) > 1) + MEASURES["weight_change"].text(100 * mean)


def drawing_of(model: Any, example_inputs: Any = None) -> Drawing:
    """Collect the data for drawing a model, which is not changed; see `visualize`. A wrapper (DDP) is removed."""
    if not isinstance(model, nn.Module):
        raise VisualizeError(
            f"`model` must be a torch.nn.Module or torch.fx.GraphModule, got {type(model).__name__}. "
            "Of an ExportedProgram, pass its module()."
        )
    model = unwrap(model)
    found = report(model) if adapted_layers(model) else Report(())
    graph = drawn_graph(model, example_inputs)
    if graph and example_inputs is not None and not any("val" in node.meta for node in graph.graph.nodes):
        _note_shapes(graph, normalize_inputs(example_inputs))
    total = sum(own.numel() for path, own in model.named_parameters() if ADAPTER_CHILDREN.isdisjoint(path.split(".")))
    facts = _facts(total, found) + " · not traced: pass example_inputs to draw the data flow" * (graph is None)
    title = type(model).__name__ + " with HRA" * bool(found.rows)
    return Drawing(title, facts, leaves_of(model, graph, found), found, _changes(found.rows))


def _note_shapes(module: fx.GraphModule, call: Call) -> None:
    """Store the fake value of every node in `node.meta["val"]`; a warning if the graph does not run on fake tensors."""
    args, kwargs = call
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        mode = fake_tensor_mode()
        # A forward may write into its buffers. A copied GraphModule shares the tensors that are not in the memo.
        tensors = (*module.parameters(), *module.buffers())
        copied = copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
        FakeTensorProp(copied, mode).propagate(*bound.arguments.values())
    except Exception as error:  # shapes are optional, and any operator of the model may fail on fake tensors
        why = str(error).strip().partition("\n")[0]
        text = f"The graph does not run on `example_inputs` ({why}), so the picture has no shapes. Check the inputs."
        warnings.warn(text, HRAWarning, stacklevel=2)
        return
    for node, noted in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        node.meta.update({"val": noted.meta["val"]} if "val" in noted.meta else {})


def _facts(parameters: int, found: Report) -> str:
    if not found.rows:
        return f"{parameters:,} parameters · no adapters"
    adapter = sum(row.parameters for row in found.rows)
    layers, ranks = counted(len({row.path for row in found.rows}), "adapted layer"), [row.r for row in found.rows]
    some = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
    words = f"{layers} · r = {some} · {adapter:,} adapter parameters"
    words += f" ({adapter / max(parameters, 1):.2%} of {parameters:,})"
    return words + " · not trained yet (identity)" * is_identity(found.rows)


def _changes(rows: Iterable[Row]) -> Mapping[str, float]:
    """The largest change of each layer's weight by an active adapter, 0 if none is active."""
    active: dict[str, list[float]] = {}
    for row in rows:
        change = math.nan if row.weight_change is None else row.weight_change
        active.setdefault(row.path, []).extend([change] if row.active else [])
    return {path: largest(own) if own else 0.0 for path, own in active.items()}
