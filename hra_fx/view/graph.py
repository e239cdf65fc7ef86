"""Convert a traced graph to a networkx graph of leaves (boxes).

Nodes are strings in drawing order, each with the attribute `leaf`. Edges are the flow of values, with `shape`. The
nodes of an adapted layer (its adapter, and the layer or its weight) become one leaf. Parameters belong to the leaf that
reads them. Nodes that only compute shapes or pass on a value do not have a leaf. In a model that is not traced, modules
are leaves without edges.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn

from hra_fx.compat import OpOverload
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, REFLECTION
from hra_fx.passes.canonical import CHECKS
from hra_fx.passes.match import is_metadata
from hra_fx.passes.modes import ByMode
from hra_fx.passes.nodes import normalize_path
from hra_fx.view.subject import classes_of, describe_module, name_of, own_parameters
from hra_fx.view.tree import Leaf, joined, module_of, prefixes

#: The submodules that check the inputs of programs and captured models, and the submodule of the factors.
_UNSEEN = ("_guards_fn", CHECKS, FACTORS)
#: Operators that return their input if it already has the requested dtype and device.
_CASTS = frozenset({"alias", "detach", "to"})
#: How `torch.export` names the tensors that a forward creates.
_LIFTED = "lifted_tensor_"


def leaves_of(model: nn.Module, graph: fx.GraphModule | None, boxes: Mapping[str, Leaf]) -> nx.DiGraph[str]:
    """Create the leaves of the whole model.

    Args:
        model: the modules by name.
        graph: the graph of the model; `None` if it is not traced.
        boxes: the box of each adapted layer, from `boxes_of`.

    Returns:
        An acyclic DiGraph. `graph["traced"]` says if the model is traced, and `graph["classes"]` has the class names by
        module path. The marks of the leaves are the adapted layers of the model, each exactly once.
    """
    builder = _Builder(model, boxes)
    builder.draw(graph)
    return builder.picture


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _place(node: fx.Node, layers: Sequence[str]) -> tuple[str, ...]:
    """The calls of the modules around a node, which computes some adapted layers."""
    entries = node.meta.get("nn_module_stack") or {}
    paths = [(str(call), normalize_path(str(entry[0])).partition("@")[0]) for call, entry in entries.items()]
    calls = {path: path + "".join(re.findall(r"@\d+$", call)) for call, path in paths if path}
    owner = list(calls)[-1] if calls else ""
    if layers and node.op == "get_attr":
        owner = _parent(layers[0])
    elif node.op == "call_module":
        owner = _parent(str(node.target))
    return tuple(calls.get(prefix, prefix) for prefix in prefixes(owner))


class _Builder:
    """Creates the leaves, in the order in which modules are defined."""

    def __init__(self, model: nn.Module, boxes: Mapping[str, Leaf]) -> None:
        self.model, self.boxes = model, boxes
        self.picture: nx.DiGraph[str] = nx.DiGraph(classes=classes_of(model))
        self.drawn: set[str] = set()  # paths of the adapted layers that a leaf has as marks
        self.counted: set[int] = set()  # ids of the parameters that a leaf counts
        self.visited: dict[int, str] = {}  # id of a module -> its path
        for path in boxes:  # layers count their own parameters, even if another node reads the weight
            self._once(own_parameters(model.get_submodule(path)))
        first = {model.get_submodule(path): path for path in boxes}
        named = model.named_modules(remove_duplicate=False)
        self.aliases = {path: first[part] for path, part in named if part in first}  # any path -> its first path
        self.inside: dict[str, dict[str, None]] = {}  # path of a module -> the adapted layers in it
        for path, layer in {**{path: path for path in boxes}, **self.aliases}.items():
            for owner in prefixes(path):
                self.inside.setdefault(owner, {})[layer] = None
        self.busy = {""} | {prefix for path in boxes for prefix in prefixes(path)}

    def draw(self, graph: fx.GraphModule | None) -> None:
        """Add all leaves."""
        self.picture.graph["traced"] = graph is not None
        if graph is None:
            self.walk(self.model, "")
        else:
            self._add_graph(graph)
        for path in self.boxes:
            self.add_missing(path)
        if not self.picture:  # a single layer, or a model without layers, is one box
            name, count = type(self.model).__name__, self._once(own_parameters(self.model))
            detail = describe_module(self.model)
            self._add("module:", Leaf(name, detail, "eager", "eager", name, (), parameters=count))

    def walk(self, module: nn.Module, path: str) -> None:
        """Add a module and its children, in the order of definition."""
        if path in self.boxes:
            self.add_missing(path)
        elif id(module) in self.visited:
            self._add_eager(path, f"same module as {self.visited[id(module)]}")
        elif path not in self.busy:
            if next(module.parameters(), None) is not None:  # modules such as dropout do not get a box
                self._add_eager(path, type(module).__name__)
        else:
            self.visited[id(module)] = path
            for name, child in module.named_children():
                self.walk(child, f"{path}.{name}".lstrip("."))

    def add_missing(self, path: str) -> None:
        """Add an adapted layer that is not in a traced graph, at the place where it is defined."""
        if path not in self.drawn:
            self._add(f"layer:{path}", self._adapted_leaf(path, "eager", tuple(prefixes(_parent(path)))))

    def _add(self, key: str, leaf: Leaf, sources: Mapping[str, str] | None = None) -> None:
        self.drawn.update(leaf.marks)
        self.picture.add_node(key, leaf=leaf)
        self.picture.add_edges_from((source, key, {"shape": shape}) for source, shape in (sources or {}).items())

    def _add_eager(self, path: str, detail: str) -> None:
        place = tuple(prefixes(_parent(path)))
        module = self.model.get_submodule(path)
        count = self._once(own_parameters(module))
        leaf = Leaf(name_of(path), detail, "eager", "eager", path, place, paths=(path,), parameters=count)
        self._add(f"module:{path}", leaf)

    def _adapted_leaf(self, path: str, op: str, place: tuple[str, ...]) -> Leaf:
        path = self.aliases.get(path, path)
        leaf = self.boxes[path]
        if path in self.drawn:
            leaf = replace(leaf, marks=(), parameters=0)
        return replace(leaf, op=op, place=place)

    def _layers_at(self, node: fx.Node) -> tuple[str, ...]:
        """The adapted layers that a node computes: its own, or all in the module that it calls."""
        path, _, name = str(node.target).rpartition(".")
        if node.op == "call_module" and name != REFLECTION:
            path = str(node.target)
        elif node.op != "get_attr" or name != BASE_WEIGHT:
            return ()
        return tuple(self.inside.get(path, ()))

    def _leaf_of_layers(
        self, layers: tuple[str, ...], node: fx.Node, module: nn.Module | None, place: tuple[str, ...]
    ) -> Leaf:
        leaf = joined([self._adapted_leaf(path, node.op, place) for path in layers])
        if module is None or module is self.model.get_submodule(layers[0]):
            return leaf
        path, count = str(node.target), leaf.parameters + self._once(own_parameters(module))
        return replace(leaf, name=name_of(path), detail=describe_module(module), target=path, parameters=count)

    def _add_graph(self, graph: fx.GraphModule) -> None:
        """Add the leaves of the traced model and their edges. A value without a box has the sources of its inputs."""
        values: dict[fx.Node, Value] = {}
        masks = constant_masks(graph.graph)
        held = dict(graph.named_parameters(remove_duplicate=False))
        for node in graph.graph.nodes:
            module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            layers = self._layers_at(node)
            value = Value() if node in masks else None if layers else pass_through(node, values, module)
            if value is None:
                key = f":{node.name}"
                before = read(node, values)
                place = _place(node, layers)
                around = (node, module, place)
                leaf = self._leaf_of_layers(layers, *around) if layers else self._leaf(*around, before)
                if leaf.kind == "op":
                    count = self._once(held[name] for name in before.weights if name in held)
                    # Also the module of the operation, because a tied parameter has only one name.
                    around_it = [module_of(call) for call in place[-1:] if before.weights]
                    readers = tuple(dict.fromkeys([*map(_parent, before.weights), *around_it]))
                    leaf = replace(leaf, parameters=count, readers=readers)
                shape, dtype = shape_and_dtype(node)
                self._add(key, replace(leaf, shape=shape, dtype=dtype), before.sources)
                value = Value({key: shape})
            values[node] = value
        inputs = [key for node, value in values.items() if node.op == "placeholder" for key in value.sources]
        self.picture.remove_nodes_from([key for key in inputs if not self.picture.out_degree(key)])

    def _leaf(self, node: fx.Node, module: nn.Module | None, place: tuple[str, ...], before: Value) -> Leaf:
        if module is not None:
            path, detail = str(node.target), describe_module(module)
            count = self._once(own_parameters(module))
            return Leaf(name_of(path), detail, "module", node.op, path, place, paths=(path,), parameters=count)
        if node.op == "placeholder":
            return Leaf(str(node.target), "", "input", node.op, str(node.target), place)
        if node.op == "output":
            return Leaf("output", "", "output", node.op, "output", place)
        weights = dict.fromkeys(name.rpartition(".")[2] for name in before.weights)
        shown = (name for name in weights if name not in ("weight", "bias") and not name.startswith(_LIFTED))
        name = function_name(node.target)
        return Leaf(name, ", ".join(shown), "op", node.op, name, place)

    def _once(self, parameters: Iterable[Tensor]) -> int:
        """The number of elements of parameters that no previous leaf counts."""
        fresh = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in self.counted}
        self.counted |= fresh.keys()
        return sum(fresh.values())


@dataclass(frozen=True)
class Value:
    """The facts about a value of a traced graph."""

    sources: Mapping[str, str] = field(default_factory=dict)  # keys of the boxes that computed it, and its shape
    weights: tuple[str, ...] = ()  # names of the parameters in it
    is_shape: bool = False  # it is a shape, or computed from shapes, and not a tensor


def read(node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
    """The union of all values that a node reads, in order."""
    values_read = [values[source] for source in node.all_input_nodes]
    sources = {key: shape for value in values_read for key, shape in value.sources.items()}
    weights = dict.fromkeys(name for value in values_read for name in value.weights)
    only_shapes = bool(values_read) and all(value.is_shape for value in values_read)
    return Value(sources, tuple(weights), only_shapes)


def pass_through(node: fx.Node, values: Mapping[fx.Node, Value], module: nn.Module | None) -> Value | None:
    """The value of a node that does not get a box; `None` if it gets one. `module` is the module that it calls."""
    if str(node.target).rpartition(".")[2] == REFLECTION:
        return read(node, values)  # the adapter is drawn with its layer
    if node.op == "get_attr":
        name = str(node.target)
        return Value() if REFLECTION in name.split(".")[-2:-1] else Value(weights=(name,))
    if node.op == "placeholder" and node.args:
        return Value()  # an optional argument, left at its default
    if module is not None:
        is_dropped = isinstance(module, nn.Identity | ByMode) or (isinstance(module, nn.Dropout) and module.p == 0)
        return read(node, values) if is_dropped or node.target in _UNSEEN else None
    if node.op in ("placeholder", "output", "call_module"):
        return None
    if not node.users and not node.all_input_nodes:
        return Value()  # it is called for its side effect
    before = read(node, values)
    if _computes_shape(node, before):
        return Value(is_shape=True)
    if _returns_its_input(node) or isinstance(node.target, type):  # such as the class of a model's outputs
        return before
    picks = node.target is operator.getitem and isinstance(node.args[1], int)
    if picks and (shape := shape_and_dtype(node)[0]):
        return replace(before, sources=dict.fromkeys(before.sources, shape))
    only_parameters = bool(before.weights) and not before.sources
    return before if picks or only_parameters else None


def constant_masks(graph: fx.Graph) -> set[fx.Node]:
    """The operators that compute masks only from sizes, as for causal attention. They do not get a box."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), int | torch.SymInt) or node.target is getattr:
            constant.add(node)
        elif isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags:
            constant |= {node} if constant.issuperset(node.all_input_nodes) else set()
    masks: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in constant and isinstance(node.meta.get("val"), Tensor):
            is_bool = getattr(node.meta.get("val"), "dtype", None) is torch.bool
            masks |= {node} if is_bool or (node.users and masks.issuperset(node.users)) else set()
    return masks


def function_name(target: object) -> str:
    """The name of a function or method, without the overload of an operator."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__).strip("_")
    if isinstance(target, FunctionType | BuiltinFunctionType):
        return target.__name__.strip("_")
    return str(getattr(target, "__name__", target))


def shape_and_dtype(node: fx.Node) -> tuple[str, str]:
    """The shape and dtype of a node's value, such as `"1×64×56×56"` and `"float32"`; empty if unknown."""
    value: Any = node.meta.get("val", node.meta.get("tensor_meta"))
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return "", ""
    sizes = "×".join(str(size) for size in value.shape)
    return sizes or "scalar", str(value.dtype).removeprefix("torch.")


def _returns_its_input(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or function_name(node.target) not in _CASTS:
        return False
    before, after = (one.meta.get("val") for one in (node.all_input_nodes[0], node))
    kinds = [(value.dtype, value.device) for value in (before, after) if isinstance(value, Tensor)]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _computes_shape(node: fx.Node, before: Value) -> bool:
    name = function_name(node.target)
    if node.target is torch._assert or name.startswith(("assert_", "sym_")) or is_metadata(node):
        return True
    value: Any = node.meta.get("val")
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    module = getattr(node.target, "__module__", "")
    return before.is_shape and module in ("_operator", "operator", "builtins", "math")
