"""From a model and its captured graphs to one networkx graph of drawable leaves.

Nodes are strings, in drawing order, each with the attribute `leaf`; edges are the flow of values inside a captured
graph. A site's two nodes (its reflection, and the layer or its weight) become one leaf, parameters are folded into what
reads them, and what only computes shapes or passes a value on is left out. Modules outside every captured graph are
leaves without edges.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType

import networkx as nx
import torch
from torch import fx, nn

from hra_fx.adapted import sites_of
from hra_fx.site import META, SiteNote
from hra_fx.view.describe import describe_module, name_of, numbers, reflecting
from hra_fx.view.tree import Leaf

#: Attributes and methods whose result is no tensor, so that what they feed is arithmetic on shapes.
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "stride", "ndimension", "is_floating_point", "get_device"})


@dataclass(frozen=True)
class _Value:
    """What is known about a value of a captured graph: the leaves that made it, the parameters in it."""

    sources: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    is_shape: bool = False


def adapted_graph(model: nn.Module, graphs: Mapping[str, fx.GraphModule]) -> nx.DiGraph[str]:
    """The leaves of the whole model.

    Args:
        model: a transformed model.
        graphs: module path -> captured graph, as `hra_fx.graphs` gives them.

    Returns:
        A DiGraph, acyclic; `graph["regions"]` are the paths of captured graphs, `graph["classes"]` the class names by
        module path. The marks of its leaves are all sites of the model, each exactly once.
    """
    builder = _Builder(model, graphs)
    builder.walk(model, "")
    for path in builder.sites:
        builder.add_missing(path)
    return builder.picture


def _prefixes(path: str) -> list[str]:
    """`"a.b.c"` to `["a", "a.b", "a.b.c"]`."""
    parts = path.split(".") if path else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_pass_through(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _stack(node: fx.Node, region: str) -> list[tuple[str, str]]:
    """The calls around a node, outermost first: (name of the call, qualified name of the module)."""
    entries = node.meta.get("nn_module_stack") or {}
    return [(_join(region, str(call)), _join(region, str(entry[0]))) for call, entry in entries.items()]


@dataclass
class _Builder:
    model: nn.Module
    graphs: Mapping[str, fx.GraphModule]
    picture: nx.DiGraph[str] = field(default_factory=nx.DiGraph)
    drawn: dict[str, str] = field(default_factory=dict)  # site -> the leaf that has its mark

    def __post_init__(self) -> None:
        self.sites = sites_of(self.model)
        self.first_name = {id(module): name for name, module in self.sites.items()}
        self.visited: dict[int, str] = {}
        self.busy = {""} | {prefix for path in (*self.graphs, *self.sites) for prefix in _prefixes(path)}
        self.picture.graph["regions"] = frozenset(self.graphs)
        self.picture.graph["classes"] = {
            name: type(module).__name__ for name, module in self.model.named_modules(remove_duplicate=False)
        }

    def walk(self, module: nn.Module, path: str) -> None:
        """Add a module and what is inside it, in the order of definition."""
        if path in self.graphs:
            self.visited[id(module)] = path
            self._add_region(path, self.graphs[path])
        elif path in self.sites:
            self.add_missing(path)
        elif id(module) in self.visited:
            self._add_eager(path, f"same module as {self.visited[id(module)]}")
        elif path not in self.busy:
            if any(True for _ in module.parameters()):  # dropout and the like are no landmarks
                self._add_eager(path, type(module).__name__)
        else:
            self.visited[id(module)] = path
            for name, child in module.named_children():
                self.walk(child, _join(path, name))

    def add_missing(self, path: str) -> None:
        """A site that no captured graph shows: it is drawn where it is defined."""
        if path not in self.drawn:
            self._add(f"site:{path}", self._site_leaf(path, "eager", tuple(_prefixes(_parent(path)))))

    def _add(self, key: str, leaf: Leaf, sources: tuple[str, ...] = ()) -> None:
        for mark in leaf.marks:
            self.drawn[mark.path] = key
        self.picture.add_node(key, leaf=leaf)
        self.picture.add_edges_from((source, key) for source in sources)

    def _add_eager(self, path: str, detail: str) -> None:
        place = tuple(_prefixes(_parent(path)))
        module = self.model.get_submodule(path)
        leaf = Leaf(name_of(path), detail, "eager", "eager", path, place, paths=(path,), parameters=numbers(module))
        self._add(f"module:{path}", leaf)

    def _site_leaf(self, path: str, op: str, place: tuple[str, ...]) -> Leaf:
        path = self.first_name[id(self.model.get_submodule(path))]
        layer = self.sites[path]
        mark, width, rank = reflecting(path, layer.hra_u)
        marks = () if path in self.drawn else (mark,)
        name = name_of(path) or type(layer).__name__
        count = numbers(layer) if marks else 0
        detail = describe_module(layer)
        return Leaf(name, detail, "site", op, path, place, marks, width, rank, paths=(path,), parameters=count)

    def _reader_leaf(self, note: SiteNote, node: fx.Node, region: str, place: tuple[str, ...]) -> Leaf:
        """A module that is called as a whole, with the marks of all sites that act in it."""
        path = _join(region, str(node.target))
        first, *others = (self._site_leaf(site, node.op, place) for site in (note.path, *note.also))
        marks = tuple(mark for leaf in (first, *others) for mark in leaf.marks)
        detail = describe_module(self.model.get_submodule(path))
        paths = tuple(leaf.target for leaf in (first, *others))
        count = sum(leaf.parameters for leaf in (first, *others))
        return replace(
            first, name=name_of(path), detail=detail, target=path, marks=marks, paths=paths, parameters=count
        )

    def _add_region(self, region: str, graph: fx.GraphModule) -> None:
        values: dict[fx.Node, _Value] = {}
        alone = region in self.sites
        knows_places = any(node.meta.get("nn_module_stack") for node in graph.graph.nodes)
        for node in graph.graph.nodes:
            value = _pass_through(node, values, self._module(region, node, graph))
            if value is None and alone and node.op in ("placeholder", "output"):
                value = _Value()
            if value is None:
                key = f"{region}:{node.name}"
                read = _read(node, values)
                place = self._place(node, region, read if not knows_places else _Value())
                self._add(key, self._leaf(node, region, graph, place, read.parameters), read.sources)
                value = _Value((key,))
            values[node] = value
        unread = [key for key in _input_keys(values) if self._is_unread_input(key)]
        self.picture.remove_nodes_from(unread)

    def _is_unread_input(self, key: str) -> bool:
        return self.picture.nodes[key]["leaf"].kind == "input" and not self.picture.out_degree(key)

    def _module(self, region: str, node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return graph.get_submodule(str(node.target))

    def _place(self, node: fx.Node, region: str, read: _Value) -> tuple[str, ...]:
        """The modules around a node; without a record of calls, an operation stays with what it reads."""
        stack = _stack(node, region)
        note = _note(node)
        if note is not None and note.role != "reader":
            owner = _parent(note.path)
        elif node.op == "call_module":
            owner = _parent(_join(region, str(node.target)))
        elif stack:
            owner = stack[-1][1]
        elif read.sources and node.op not in ("placeholder", "output"):
            return self._leaf_of(read.sources[-1]).place
        else:
            owner = region
        calls = {path: call for call, path in stack}
        return tuple(calls.get(prefix, prefix) for prefix in _prefixes(owner))

    def _leaf_of(self, key: str) -> Leaf:
        leaf: Leaf = self.picture.nodes[key]["leaf"]
        return leaf

    def _leaf(
        self, node: fx.Node, region: str, graph: fx.GraphModule, place: tuple[str, ...], parameters: tuple[str, ...]
    ) -> Leaf:
        note = _note(node)
        if note is not None and note.role == "reader":
            return self._reader_leaf(note, node, region, place)
        if note is not None:
            return self._site_leaf(note.path, node.op, place)
        if node.op == "call_module":
            path = _join(region, str(node.target))
            module = graph.get_submodule(str(node.target))
            detail, count = describe_module(module), numbers(module)
            return Leaf(name_of(path), detail, "module", node.op, path, place, paths=(path,), parameters=count)
        if node.op == "placeholder":
            return Leaf(str(node.target), "", "input", node.op, str(node.target), place)
        if node.op == "output":
            return Leaf("output", "", "output", node.op, "output", place)
        name = _function_name(node.target)
        return Leaf(name, ", ".join(parameters), "op", node.op, name, place)


def _input_keys(values: Mapping[fx.Node, _Value]) -> Iterator[str]:
    """The leaves that were made for the placeholders of a graph."""
    for node, value in values.items():
        if node.op == "placeholder":
            yield from value.sources


def _note(node: fx.Node) -> SiteNote | None:
    note = node.meta.get(META)
    return note if isinstance(note, SiteNote) else None


def _read(node: fx.Node, values: Mapping[fx.Node, _Value]) -> _Value:
    """All that a node reads, each once, in order."""
    read = [values[source] for source in node.all_input_nodes]
    sources = dict.fromkeys(key for value in read for key in value.sources)
    parameters = dict.fromkeys(name for value in read for name in value.parameters)
    return _Value(tuple(sources), tuple(parameters), bool(read) and all(value.is_shape for value in read))


def _pass_through(node: fx.Node, values: Mapping[fx.Node, _Value], module: nn.Module | None) -> _Value | None:
    """The value of a node that gets no box, `None` where it gets one."""
    note = _note(node)
    if note is not None:
        return _read(node, values) if note.role == "reflection" else None
    if node.op == "get_attr":
        name = str(node.target).rpartition(".")[2]
        return _Value(parameters=() if name in ("weight", "bias") else (name,))
    if node.op == "placeholder" and node.args:
        return _Value()  # an optional argument, left at its default
    if module is not None:
        return _read(node, values) if _is_pass_through(module) else None
    if node.op in ("placeholder", "output", "call_module"):
        return None
    read = _read(node, values)
    if _computes_shape(node, read):
        return _Value(is_shape=True)
    picks = node.target is operator.getitem and isinstance(node.args[1], int)
    only_parameters = bool(read.parameters) and not read.sources
    return read if picks or only_parameters else None


def _computes_shape(node: fx.Node, read: _Value) -> bool:
    if node.target is torch._assert:
        return True
    if node.op == "call_method":
        return str(node.target) in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    module = getattr(node.target, "__module__", "")
    return read.is_shape and module in ("_operator", "operator", "builtins", "math", "_warnings", "warnings")


def _function_name(target: object) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, FunctionType | BuiltinFunctionType):
        return target.__name__.strip("_")
    return str(getattr(target, "__name__", target))
