"""Convert traced graphs to one networkx graph of leaves (boxes).

Nodes are strings in drawing order, each with the attribute `leaf`. Edges are the flow of values in a traced graph. The
nodes of an adapted layer (its adapter, and the layer or its weight) become one leaf. Parameters belong to the leaf that
reads them. Nodes that only compute shapes or pass on a value do not have a leaf. Modules outside of all traced graphs
are leaves without edges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import networkx as nx
from torch import Tensor, fx, nn

from hra_fx.layers.target import NodeTag
from hra_fx.tracing.graph_module import normalize_path
from hra_fx.view.subject import Subject, describe_module, name_of, own_parameters
from hra_fx.view.tree import Leaf, joined, module_of, prefixes
from hra_fx.view.values import Value, constant_masks, function_name, pass_through, read, shape_and_dtype, tag_of


def leaves_of(subject: Subject) -> nx.DiGraph[str]:
    """Create the leaves of the whole model.

    Returns:
        An acyclic DiGraph. `graph["traced"]` has the paths of the traced modules, `graph["classes"]` the class names by
        module path, and `graph["details"]` the class and shape of modules without children. The marks of the leaves are
        the adapted layers of the model, each exactly once.
    """
    builder = _Builder(subject)
    builder.draw()
    return builder.picture


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _stack(node: fx.Node, root: str) -> list[tuple[str, str]]:
    """The calls around a node, outermost first: (name of the call, qualified name of the module)."""
    entries = node.meta.get("nn_module_stack") or {}
    paths = [(str(call), normalize_path(str(entry[0])).partition("@")[0]) for call, entry in entries.items()]
    calls = [(path + "".join(re.findall(r"@\d+$", call)), path) for call, path in paths]
    return [(_join(root, call), _join(root, path)) for call, path in calls if path]


@dataclass
class _Builder:
    subject: Subject
    picture: nx.DiGraph[str] = field(default_factory=nx.DiGraph)
    drawn: dict[str, str] = field(default_factory=dict)  # adapted layer -> the leaf that has its mark
    counted: set[int] = field(default_factory=set)  # ids of the parameters that a leaf counts

    def __post_init__(self) -> None:
        self.model = self.subject.model
        self.graphs = self.subject.graphs
        self.visited: dict[int, str] = {}
        for path in self.subject.layers:  # layers count their own parameters, even if another node reads the weight
            self._once(own_parameters(self.model.get_submodule(path)))
        self.busy = {""} | {prefix for path in (*self.graphs, *self.subject.layers) for prefix in prefixes(path)}
        details = {path: describe_module(part) for path, part in self.model.named_modules() if not _has_parts(part)}
        self.picture.graph["traced"] = frozenset(self.graphs)
        self.picture.graph["classes"] = dict(self.subject.classes)
        self.picture.graph["details"] = details

    def draw(self) -> None:
        """Add all leaves."""
        self.walk(self.model, "")
        for path in self.subject.layers:
            self.add_missing(path)
        if not self.picture:  # a single layer, or a model without layers, is one box
            name = self.subject.classes.get("", "")
            count = self._once(own_parameters(self.model))
            detail = describe_module(self.model)
            self._add("module:", Leaf(name, detail, "eager", "eager", name, (), parameters=count))

    def walk(self, module: nn.Module, path: str) -> None:
        """Add a module and its children, in the order of definition."""
        if path in self.graphs:
            self.visited[id(module)] = path
            self._add_graph(path, self.graphs[path])
        elif path in self.subject.layers:
            self.add_missing(path)
        elif id(module) in self.visited:
            self._add_eager(path, f"same module as {self.visited[id(module)]}")
        elif path not in self.busy:
            if any(True for _ in module.parameters()):  # modules such as dropout do not get a box
                self._add_eager(path, type(module).__name__)
        else:
            self.visited[id(module)] = path
            for name, child in module.named_children():
                self.walk(child, _join(path, name))

    def add_missing(self, path: str) -> None:
        """Add an adapted layer that is not in a traced graph, at the place where it is defined."""
        if path not in self.drawn:
            self._add(f"layer:{path}", self._adapted_leaf(path, "eager", tuple(prefixes(_parent(path)))))

    def _add(self, key: str, leaf: Leaf, sources: tuple[str, ...] = ()) -> None:
        self.drawn.update(dict.fromkeys(leaf.marks, key))
        self.picture.add_node(key, leaf=leaf)
        self.picture.add_edges_from((source, key) for source in sources)

    def _add_eager(self, path: str, detail: str) -> None:
        place = tuple(prefixes(_parent(path)))
        module = self.model.get_submodule(path)
        count = self._once(own_parameters(module))
        leaf = Leaf(name_of(path), detail, "eager", "eager", path, place, paths=(path,), parameters=count)
        self._add(f"module:{path}", leaf)

    def _adapted_leaf(self, path: str, op: str, place: tuple[str, ...]) -> Leaf:
        path = self.subject.aliases.get(path, path)
        layer = self.subject.layers[path]
        marks = () if path in self.drawn else (path,)
        return Leaf(
            name=name_of(path) or self.subject.classes.get(path, ""),
            detail=layer.detail,
            kind="adapted_layer",
            op=op,
            target=path,
            place=place,
            marks=marks,
            width=layer.width,
            rank=layer.rank,
            paths=(path,),
            parameters=layer.parameters if marks else 0,
        )

    def _reader_leaf(self, note: NodeTag, node: fx.Node, root: str, place: tuple[str, ...]) -> Leaf:
        """Create the leaf of a node that reads rotated weights, with the marks of all their layers."""
        leaf = joined([self._adapted_leaf(path, node.op, place) for path in (note.path, *note.also)])
        if node.op != "call_module":
            return leaf
        path = _join(root, str(node.target))
        module = self.model.get_submodule(path)
        count = leaf.parameters + self._once(own_parameters(module))
        return replace(leaf, name=name_of(path), detail=describe_module(module), target=path, parameters=count)

    def _add_graph(self, root: str, graph: fx.GraphModule) -> None:
        values: dict[fx.Node, Value] = {}
        masks = constant_masks(graph.graph)
        single = root in self.subject.layers
        knows_places = any(node.meta.get("nn_module_stack") for node in graph.graph.nodes)
        held = dict(graph.named_parameters(remove_duplicate=False))
        for node in graph.graph.nodes:
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            value = Value() if node in masks else pass_through(node, values, module)
            if value is None and single and node.op in ("placeholder", "output"):
                value = Value()
            if value is None:
                key = f"{root}:{node.name}"
                before = read(node, values)
                place = self._place(node, root, before if not knows_places else Value())
                leaf = self._leaf(node, root, module, place, before)
                if leaf.kind == "op":
                    count = self._once(held[name] for name in before.weights if name in held)
                    leaf = replace(leaf, parameters=count, readers=_readers(root, before.weights, place))
                shape, dtype = shape_and_dtype(node)
                self._add(key, replace(leaf, shape=shape, dtype=dtype), before.sources)
                value = Value((key,))
            values[node] = value
        unread = [key for key in _input_keys(values) if self._is_unread_input(key)]
        self.picture.remove_nodes_from(unread)

    def _is_unread_input(self, key: str) -> bool:
        return self.picture.nodes[key]["leaf"].kind == "input" and not self.picture.out_degree(key)

    def _place(self, node: fx.Node, root: str, before: Value) -> tuple[str, ...]:
        """The modules around a node. Without `nn_module_stack`, an operation is placed with its input."""
        stack = _stack(node, root)
        note = tag_of(node)
        if note is not None and note.role != "reader":
            # Attention has more operators than those that read its weight.
            inside = note.kind == "attention" and node.op == "call_function"
            owner = note.path if inside else _parent(note.path)
        elif node.op == "call_module":
            owner = _parent(_join(root, str(node.target)))
        elif stack:
            owner = stack[-1][1]
        elif before.sources and node.op not in ("placeholder", "output"):
            return self._leaf_of(before.sources[-1]).place
        else:
            owner = root
        calls = {path: call for call, path in stack}
        return tuple(calls.get(prefix, prefix) for prefix in prefixes(owner))

    def _leaf_of(self, key: str) -> Leaf:
        leaf: Leaf = self.picture.nodes[key]["leaf"]
        return leaf

    def _leaf(self, node: fx.Node, root: str, module: nn.Module | None, place: tuple[str, ...], before: Value) -> Leaf:
        note = tag_of(node)
        if note is not None and note.role == "reader":
            return self._reader_leaf(note, node, root, place)
        if note is not None:
            return self._adapted_leaf(note.path, node.op, place)
        if module is not None:
            path, detail = _join(root, str(node.target)), describe_module(module)
            count = self._once(own_parameters(module))
            return Leaf(name_of(path), detail, "module", node.op, path, place, paths=(path,), parameters=count)
        if node.op == "placeholder":
            return Leaf(str(node.target), "", "input", node.op, str(node.target), place)
        if node.op == "output":
            return Leaf("output", "", "output", node.op, "output", place)
        name, detail = function_name(node.target), ", ".join(before.parameters)
        return Leaf(name, detail, "op", node.op, name, place)

    def _once(self, parameters: Iterable[Tensor]) -> int:
        """The number of elements of parameters that no previous leaf counts."""
        fresh = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in self.counted}
        self.counted |= fresh.keys()
        return sum(fresh.values())


def _readers(root: str, weights: tuple[str, ...], place: tuple[str, ...]) -> tuple[str, ...]:
    """The modules whose parameters an operation reads, and its own module, because a tied parameter has one name."""
    around = [module_of(call) for call in place[-1:] if weights]
    return tuple(dict.fromkeys([*(_join(root, _parent(name)) for name in weights), *around]))


def _has_parts(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _input_keys(values: Mapping[fx.Node, Value]) -> Iterator[str]:
    """The keys of the leaves of a graph's placeholders."""
    for node, value in values.items():
        if node.op == "placeholder":
            yield from value.sources
