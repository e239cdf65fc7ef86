"""The values of a traced graph: which boxes they come from, and which nodes do not get a box."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import OpOverload
from hra_fx.layers.target import FACTORS, META, REFLECTION, NodeTag
from hra_fx.tracing.by_mode import ByMode

#: Attributes and methods with results that are not tensors. Nodes that use these results compute shapes.
_SHAPE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"})
_SHAPE_METHODS = frozenset({"size", "dim", "numel", "stride", "ndimension", "is_floating_point", "get_device"})
#: The submodules that check the inputs of programs and captured models, and the submodule of the factors.
_UNSEEN = ("_guards_fn", "check_inputs", FACTORS)
#: Operators that return their input if it already has the requested dtype and device.
_CASTS = frozenset({"alias", "detach", "to"})
#: How `torch.export` names the tensors that a forward creates.
_LIFTED = "lifted_tensor_"


@dataclass(frozen=True)
class Value:
    """The facts about a value of a traced graph.

    Attributes:
        sources: keys of the boxes that computed it.
        parameters: names of the tensors in it that are shown.
        weights: names of the parameters in it.
        is_shape: whether it is a shape, or computed from shapes, and not a tensor.
    """

    sources: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    is_shape: bool = False


def tag_of(node: fx.Node) -> NodeTag | None:
    """The tag of an adapted layer on a node."""
    note = node.meta.get(META)
    return note if isinstance(note, NodeTag) else None


def read(node: fx.Node, values: Mapping[fx.Node, Value]) -> Value:
    """The union of all values that a node reads, in order."""
    values_read = [values[source] for source in node.all_input_nodes]
    sources = dict.fromkeys(key for value in values_read for key in value.sources)
    parameters = dict.fromkeys(name for value in values_read for name in value.parameters)
    weights = dict.fromkeys(name for value in values_read for name in value.weights)
    only_shapes = bool(values_read) and all(value.is_shape for value in values_read)
    return Value(tuple(sources), tuple(parameters), tuple(weights), only_shapes)


def pass_through(node: fx.Node, values: Mapping[fx.Node, Value], module: nn.Module | None) -> Value | None:
    """The value of a node that does not get a box; `None` if it gets one.

    Args:
        node: the node.
        values: the values of previous nodes.
        module: the module that the node calls.
    """
    note = tag_of(node)
    if note is not None:
        return read(node, values) if note.role == "reflection" else None
    if node.op == "get_attr":
        return _tensor(str(node.target))
    if node.op == "placeholder" and node.args:
        return Value()  # an optional argument, left at its default
    if module is not None:
        return read(node, values) if _is_pass_through(module) or node.target in _UNSEEN else None
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
    only_parameters = bool(before.parameters or before.weights) and not before.sources
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


def _tensor(name: str) -> Value:
    path, _, last = name.rpartition(".")
    if path.rpartition(".")[2] == REFLECTION:
        return Value()
    is_plain = last in ("weight", "bias") or last.startswith(_LIFTED)
    return Value(parameters=() if is_plain else (last,), weights=(name,))


def _is_pass_through(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity | ByMode) or (isinstance(module, nn.Dropout) and module.p == 0)


def _returns_its_input(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or function_name(node.target) not in _CASTS:
        return False
    before, after = (one.meta.get("val") for one in (node.all_input_nodes[0], node))
    kinds = [(value.dtype, value.device) for value in (before, after) if isinstance(value, Tensor)]
    return len(kinds) == 2 and kinds[0] == kinds[1]


def _computes_shape(node: fx.Node, before: Value) -> bool:
    if node.target is torch._assert or function_name(node.target).startswith(("assert_", "sym_")):
        return True
    if node.op == "call_method":
        return str(node.target) in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    value: Any = node.meta.get("val")
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool) and not isinstance(value, Tensor):
        return True
    module = getattr(node.target, "__module__", "")
    return before.is_shape and module in ("_operator", "operator", "builtins", "math")
