"""Convert a traced graph to a networkx graph of leaves (boxes).

Nodes are strings in drawing order, each with the attribute `leaf`. Edges are the flow of values, with `shape`. The
nodes of an adapted layer (its adapter, and the layer or its weight) become one leaf. Nodes that only compute shapes,
pass on a value, or do not depend on the inputs of the model do not have a leaf. In a model that is not traced, modules
are leaves without edges.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn

from hra_fx.layers.target import BASE_WEIGHT, FACTORS, REFLECTION, describe
from hra_fx.model.state import adapted_layers
from hra_fx.passes.canonical import CHECKS
from hra_fx.passes.match import is_metadata
from hra_fx.passes.modes import ByMode
from hra_fx.passes.nodes import attribute, normalize_path
from hra_fx.reporting.report import Report
from hra_fx.view.tree import Leaf, joined, module_of, name_of, prefixes

#: The submodules that check the inputs of programs and captured models, and the submodule of the factors.
_UNSEEN = ("_guards_fn", CHECKS, FACTORS)


def leaves_of(model: nn.Module, graph: fx.GraphModule | None, report: Report) -> nx.DiGraph[str]:
    """Create the leaves of the whole model.

    Args:
        model: the modules by name.
        graph: the graph of the model; `None` if it is not traced.
        report: the report on the model; empty for a plain model.

    Returns:
        An acyclic DiGraph. `graph["traced"]` says if the model is traced, and `graph["classes"]` has the class names by
        module path. The marks of the leaves are the adapted layers of the model, each exactly once.
    """
    builder = _Builder(model, report)
    if graph is None:
        builder.add_modules()
    else:
        builder.add_graph(graph)
    builder.add_missing()
    builder.picture.graph["traced"] = graph is not None
    return builder.picture


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _detail(module: nn.Module) -> str:
    """The class and shape of a layer, or the class of any other module."""
    return describe(module).replace("->", "→")


class _Builder:
    """Creates the leaves, in the order in which modules are defined."""

    def __init__(self, model: nn.Module, report: Report) -> None:
        self.model, self.report = model, report
        classes = {path: type(part).__name__ for path, part in model.named_modules(remove_duplicate=False)}
        self.picture: nx.DiGraph[str] = nx.DiGraph(classes=classes)
        self.boxes = {path: self._box(path, layer) for path, layer in adapted_layers(model).items()}
        self.drawn: set[str] = set()  # paths of the adapted layers that a leaf has as marks
        first = {model.get_submodule(path): path for path in self.boxes}
        self.inside: dict[str, dict[str, None]] = {}  # path of a module -> the adapted layers in it
        for path, part in model.named_modules(remove_duplicate=False):
            for owner in prefixes(path) if part in first else ():
                self.inside.setdefault(owner, {})[first[part]] = None

    def _box(self, path: str, layer: nn.Module) -> Leaf:
        rows = [row for row in self.report.rows if row.path == path]
        rank, place = sum(row.r for row in rows if row.active), tuple(prefixes(_parent(path)))
        name = name_of(path) or type(layer).__name__
        return Leaf(name, _detail(layer), "adapted_layer", path, place, marks=(path,), width=rows[0].d, rank=rank)

    def add_modules(self) -> None:
        """Add the modules of a model that is not traced: adapted layers, and the outermost modules without any."""
        opened = {"", *(owner for path in self.boxes for owner in prefixes(_parent(path)))} - self.boxes.keys()
        for path, part in self.model.named_modules():
            if path in self.boxes:
                self._add(f"layer:{path}", self.boxes[path])
            elif path and path not in opened and _parent(path) in opened and next(part.parameters(), None) is not None:
                self._add(f"module:{path}", self._module(path, part, "eager"))
        if not self.picture:  # a single layer, or a model without layers, is one box
            name = type(self.model).__name__
            self._add("module:", Leaf(name, _detail(self.model), "eager", name, ()))

    def add_missing(self) -> None:
        """Add the adapted layers that are not in a traced graph, at the place where they are defined."""
        for path, box in self.boxes.items():
            if path not in self.drawn:
                self._add(f"layer:{path}", box)

    def _add(self, key: str, leaf: Leaf, sources: Mapping[str, str] | None = None) -> None:
        self.drawn.update(leaf.marks)
        self.picture.add_node(key, leaf=leaf)
        self.picture.add_edges_from((source, key, {"shape": shape}) for source, shape in (sources or {}).items())

    def _module(self, path: str, module: nn.Module, kind: Any = "module") -> Leaf:
        leaf = Leaf(name_of(path), _detail(module), kind, path, tuple(prefixes(_parent(path))))
        return self._with_skipped(leaf, path)

    def _with_skipped(self, leaf: Leaf, path: str) -> Leaf:
        """A leaf with the layers without an adapter in a module."""
        skipped = tuple(layer for layer in self.report.skipped if f"{layer.path}.".startswith(f"{path}."))
        trained = tuple(full for full in self.report.trained_in_full if f"{full}.".startswith(f"{path}."))
        return replace(leaf, skipped=skipped, trained=trained)

    def _layers_at(self, node: fx.Node) -> tuple[str, ...]:
        """The adapted layers that a node computes: its own, or all in the module that it calls."""
        path, _, name = str(node.target).rpartition(".")
        if node.op == "call_module" and name != REFLECTION:
            path = str(node.target)
        elif node.op != "get_attr" or name != BASE_WEIGHT:
            return ()
        return tuple(self.inside.get(path, ()))

    def _leaf_of_layers(self, layers: tuple[str, ...], node: fx.Node, module: nn.Module | None) -> Leaf:
        own = (replace(self.boxes[path], marks=() if path in self.drawn else (path,)) for path in layers)
        leaf = joined(list(own))
        if module is None or module is self.model.get_submodule(layers[0]):
            return leaf
        path = str(node.target)
        return replace(leaf, name=name_of(path), detail=_detail(module), target=path)

    def add_graph(self, graph: fx.GraphModule) -> None:
        """Add the leaves of the traced model and their edges. A value without a box has the sources of its inputs."""
        values: dict[fx.Node, Value] = {}
        for node in graph.graph.nodes:
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            layers = self._layers_at(node)
            value = None if layers else pass_through(node, values, module)
            if value is None:
                before, place, shape = read(node, values), self._place(node, layers), shape_of(node)
                around = (node, module)
                leaf = self._leaf_of_layers(layers, *around) if layers else self._leaf(*around, place, before.weights)
                self._add(node.name, replace(leaf, place=place, shape=shape), before.sources)
                value = Value({node.name: shape})
            values[node] = value
        inputs = [key for node, value in values.items() if node.op == "placeholder" for key in value.sources]
        self.picture.remove_nodes_from([key for key in inputs if not self.picture.out_degree(key)])

    def _leaf(self, node: fx.Node, module: nn.Module | None, place: tuple[str, ...], weights: tuple[str, ...]) -> Leaf:
        path = str(node.target)
        if module is not None:
            return self._module(path, module)
        if node.op == "placeholder":
            return Leaf(path, "", "input", path, ())
        if node.op == "output":
            return Leaf("output", "", "output", "output", ())
        names = (name for name in weights if isinstance(attribute(self.model, name), nn.Parameter))
        shown = dict.fromkeys(name_of(name) for name in names if not name.endswith((".weight", ".bias")))
        name = function_name(node.target)
        leaf = Leaf(name, ", ".join(shown), "op", name, ())
        owner = module_of(place[-1]) if place and weights else ""
        is_layer = owner in {*(layer.path for layer in self.report.skipped), *self.report.trained_in_full}
        return self._with_skipped(leaf, owner) if is_layer else leaf

    def _place(self, node: fx.Node, layers: tuple[str, ...]) -> tuple[str, ...]:
        """The calls of the modules around a node, which computes some adapted layers. Also note their classes."""
        calls: dict[str, str] = {}
        for call, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
            if normal := normalize_path(str(path)).partition("@")[0]:
                calls[normal] = normal + "".join(re.findall(r"@\d+$", str(call)))
                # The modules of a `GraphModule` are plain: their classes are only known here.
                name = cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__
                self.picture.graph["classes"][normal] = name
        owner = next(reversed(calls), "")
        if layers and node.op == "get_attr":
            owner = _parent(layers[0])
        elif node.op == "call_module":
            owner = _parent(str(node.target))
        return tuple(calls.get(prefix, prefix) for prefix in prefixes(owner))


@dataclass(frozen=True)
class Value:
    """The facts about a value of a traced graph."""

    sources: Mapping[str, str] = field(default_factory=dict)  # keys of the boxes that computed it, and its shape
    weights: tuple[str, ...] = ()  # names of the parameters in it


def read(node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
    """The union of all values that a node reads, in order."""
    values_read = [values[source] for source in node.all_input_nodes]
    sources = {key: shape for value in values_read for key, shape in value.sources.items()}
    return Value(sources, tuple(dict.fromkeys(name for value in values_read for name in value.weights)))


def pass_through(node: fx.Node, values: Mapping[fx.Node, Value], module: nn.Module | None) -> Value | None:
    """The value of a node that does not get a box; `None` if it gets one. `module` is the module that it calls."""
    if str(node.target).rpartition(".")[2] == REFLECTION:
        return read(node, values)  # the adapter is drawn with its layer
    if node.op == "get_attr":
        name = str(node.target)
        return Value() if REFLECTION in name.split(".")[-2:-1] else Value(weights=(name,))
    if module is not None:
        is_dropped = isinstance(module, nn.Identity | ByMode) or (isinstance(module, nn.Dropout) and module.p == 0)
        return read(node, values) if is_dropped or node.target in _UNSEEN else None
    if node.op in ("placeholder", "output"):
        return None
    if not node.users or is_metadata(node) or isinstance(node.meta.get("val"), _NUMBERS):
        return Value()
    before = read(node, values)
    if isinstance(node.target, type):  # such as the class of a model's outputs
        return before
    if node.target is operator.getitem and isinstance(node.args[1], int):
        shape = shape_of(node)
        return replace(before, sources=dict.fromkeys(before.sources, shape)) if shape else before
    depends_on_inputs = bool(before.sources) or function_name(node.target) == "embedding"  # such as of positions
    return None if depends_on_inputs else before


#: Values that are not tensors, in a graph of `torch.export`.
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def function_name(target: Any) -> str:
    """The name of a function or method, without the overload of an operator."""
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target)).strip("_")


def shape_of(node: fx.Node) -> str:
    """The shape of a node's value, such as `"1×64×56×56"`; empty if unknown."""
    value: Any = node.meta.get("val", node.meta.get("tensor_meta"))
    return ("×".join(map(str, value.shape)) or "scalar") if hasattr(value, "shape") else ""
