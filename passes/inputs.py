"""Inputs and outputs of a captured graph: nodes for nested values, and conditions on the inputs.

`torch.export` flattens the arguments and the result of a call outside of its graph. A plain graph, which fx can copy
and pickle, has nodes for this:

    input_ids = placeholder;  boxes = placeholder;  first = boxes[0]
    ...
    output = CausalLMOutputWithPast(logits=linear)

`torch.export` also finds conditions such as "the length is at most 512" while it captures a call. They are stored as
expressions in a module that the graph calls first, so that copies and pickles of the graph contain them.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import children_of, guard_function, guards_of, pytree
from hra_fx.errors import CaptureError
from hra_fx.passes.compare import Limits
from hra_fx.selection.origin import GraphPart

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of the arguments of a call, in order. Arguments in `*args` are numbered."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(args) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(names) < len(args):
            names.append(parameter.name)
    return [*names, *kwargs]


class Inputs(NamedTuple):
    """The inputs of a graph.

    Attributes:
        arguments: the placeholders, in the order of the model's signature.
        flat: the nodes of the values in them.
        places: for each flat value, its Python expression, with the names of the arguments.
        conditions: those on the structure of the arguments, as expressions.
        orders: those on the order of the keys of dictionaries.
    """

    arguments: list[fx.Node]
    flat: list[fx.Node]
    places: list[str]
    conditions: list[str]
    orders: list[str]


def nest(graph: fx.Graph, program: ExportedProgram, model: nn.Module) -> Inputs:
    """Add the nested arguments and results of a program to its graph, in place."""
    parameters = inspect.signature(model.forward).parameters
    spec: Any = program.call_spec.in_spec
    names = argument_names(model, *pytree.tree_unflatten(range(spec.num_leaves), spec))
    specs = [argument for part in children_of(spec) for argument in children_of(part)]
    old = list(graph.find_nodes(op="placeholder"))
    flat, made = iter(old), Inputs([], [], [], [], [])
    start = old[-1].next if old else next(iter(graph.nodes))
    for name, default in _with_skipped(parameters, names):
        with graph.inserting_before(old[0] if old else start):
            argument = graph.placeholder(name, default_value=default)
        made.arguments.append(argument)
        if name not in names:
            if not isinstance(default, (bool, int, float, str, type(None))):
                raise CaptureError(f"its argument {name!r} has a default that a graph cannot have. Pass it")
            made.conditions.append(_equals(place_of(name), default))
            continue
        with graph.inserting_before(start):
            leaves = _leaves(graph, argument, specs[names.index(name)], place_of(name), made)
            for value, place in leaves:
                before = next(flat)
                value.meta = dict(before.meta)
                before.replace_all_uses_with(value)
                made.flat.append(value)
                made.places.append(place)
    for node in old:
        graph.erase_node(node)
    end: Any = graph.output_node()
    results = iter(end.args[0])
    with graph.inserting_before(end):
        end.args = (_nested(graph, program.call_spec.out_spec, results),)
    graph.set_codegen(fx.graph.CodeGen())
    return made


def _with_skipped(parameters: Mapping[str, inspect.Parameter], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The arguments of a call and their defaults, with those that the call skips, so that all have their positions."""
    empty = inspect.Parameter.empty
    by_place = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    while by_place and by_place[-1] not in names:
        by_place.pop()
    needs_default = False  # Python asks for it behind an argument with a default
    for name in [*by_place, *(name for name in names if name not in by_place)]:
        needs_default |= name not in names
        default = parameters[name].default if name in parameters else None
        yield name, (None if default is empty else default) if needs_default else empty


#: Names that conditions use.
_OF_CONDITIONS = {"isinstance", "len", "list", "math", "repr", "set", "torch", "type"}


def place_of(name: str) -> str:
    """The name of an argument in conditions, which does not hide a function that they call."""
    return f"{name}_" if name in _OF_CONDITIONS else name


def _equals(place: str, value: Any) -> str:
    """The condition that a value is a constant, and of its type: `True == 1 == 1.0`."""
    return f"{place} is None" if value is None else f"repr({place}) == {repr(value)!r}"


def _leaves(graph: fx.Graph, value: fx.Node, spec: Any, place: str, inputs: Inputs) -> Iterator[tuple[fx.Node, str]]:
    """Create nodes for the values in an argument, each with its place; add the conditions on its containers."""
    if spec.is_leaf():
        yield value, place
        return
    kind = {namedtuple: tuple, OrderedDict: dict}.get(spec.type, spec.type)
    if is_dataclass(kind):
        inputs.conditions.append(f"type({place}).__name__ == {spec.type.__name__!r}")
        for name, child in zip(spec.context, children_of(spec), strict=True):
            item = graph.call_function(getattr, (value, name))
            yield from _leaves(graph, item, child, f"{place}.{name}", inputs)
        return
    if kind not in (tuple, list, dict):
        raise CaptureError(f"its input {place!r} contains a {spec.type.__name__}, which a graph cannot unpack")
    keys = spec.context if kind is dict else range(spec.num_children)
    test = f"set({place}) == {set(keys)!r}" if keys and kind is dict else f"len({place}) == {len(keys)}"
    inputs.conditions.append(f"isinstance({place}, {kind.__name__}) and {test}")
    if kind is dict:
        inputs.orders.append(f"list({place}) == {list(keys)!r}")
    for key, child in zip(keys, children_of(spec), strict=True):
        item = graph.call_function(operator.getitem, (value, key))
        yield from _leaves(graph, item, child, f"{place}[{key!r}]", inputs)


def _nested(graph: fx.Graph, spec: Any, results: Iterator[Any]) -> Any:
    """Create an argument of the output node: containers, and calls of output classes."""
    if spec.is_leaf():
        return next(results)
    children = [_nested(graph, child, results) for child in children_of(spec)]
    if spec.type in (tuple, list):
        return spec.type(children)
    if spec.type is dict:
        return dict(zip(spec.context, children, strict=True))
    if spec.type is namedtuple:  # the context is its class
        made = graph.call_function(spec.context, tuple(children))
    else:
        is_named = issubclass(spec.type, dict) or is_dataclass(spec.type)
        if not is_named or spec.type is defaultdict or not all(isinstance(key, str) for key in spec.context):
            raise CaptureError(f"it returns a {spec.type.__name__}, which a graph cannot create")
        # An OrderedDict, a dataclass, or an output of transformers and diffusers.
        made = graph.call_function(spec.type, (), dict(zip(spec.context, children, strict=True)))
    made.meta["is_wrapped"] = True  # so that it stays a node when fx unpickles the graph
    return made


# --- conditions -------------------------------------------------------------------------------------------------------


class InputChecks(GraphPart):
    """Checks the inputs of a graph."""

    def __init__(self, names: Sequence[str], conditions: Sequence[str]) -> None:
        """Store the names of the inputs, and the conditions: Python expressions with these names."""
        super().__init__()
        self.names = tuple(names)
        self.conditions: tuple[str, ...] = ()
        self.add(conditions)

    def forward(self, *args: Any) -> None:
        """Check all inputs."""
        self._check(*args)

    def add(self, conditions: Sequence[str]) -> None:
        """Add conditions."""
        self.conditions = tuple(dict.fromkeys([*self.conditions, *conditions]))
        self._check = guard_function(_code(self.names, self.conditions))

    def extra_repr(self) -> str:
        """Show the conditions."""
        return ", ".join(self.conditions)

    def __reduce__(self) -> Any:
        """Copy and pickle the conditions, without their function."""
        return InputChecks, (self.names, self.conditions)


def _code(names: Sequence[str], conditions: Sequence[str]) -> str:
    """The source of a function that asserts all conditions."""
    lines = [f"def check({', '.join(names)}):"]
    for condition in conditions:
        message = (
            f"the graph was captured for inputs with `{condition}`. Call the original model, or capture it "
            "for these inputs: pass them as `example_inputs` to hra_fx.transform(..., trace=True), or to "
            "torch.export.export."
        )
        lines.append(f"    torch._assert({condition}, {message!r})")
    return "\n".join([*lines, "    return None"])


def limit_conditions(inputs: Inputs, sizes: Sequence[Sequence[tuple[int, int]]], limits: Limits) -> list[str]:
    """The conditions that sizes are not 0, and those that a comparison found."""
    made = list[str]()
    alone = [frozenset([which]) for which in range(len(sizes))]
    for ones in [*alone, *(some for some in limits.not_one if len(some) > 1)]:
        places = [sizes[which][0] for which in sorted(ones)]
        least = int(ones in limits.not_one)
        made.append(" or ".join(f"{inputs.places[index]}.size()[{dimension}] > {least}" for index, dimension in places))
    if limits.ordered:
        made += inputs.orders
    flat = zip(inputs.places, inputs.flat, strict=True)
    tensors = [place for place, node in flat if isinstance(node.meta.get("val"), Tensor)]
    made += [f"{place}.{layout}" for layout in limits.layouts for place in tensors]
    if not limits.autocast:
        made.append("not torch.is_autocast_enabled('cpu') and not torch.is_autocast_enabled('cuda')")
    return made


def conditions_of(program: ExportedProgram, inputs: Inputs) -> list[str]:
    """The conditions on the inputs of a program."""
    found = [*inputs.conditions, *_of_shapes(program, inputs)]
    for guard in guards_of(program):  # expressions of L, a dictionary of the arguments
        text = guard.replace("\n", "")
        text = re.sub(r"L\['flat_args'\]\[(\d+)\]", lambda index: inputs.places[int(index[1])], text)
        text = re.sub(r"L\['(\w+)'\]", lambda name: place_of(name[1]), text)
        found.append(ast.unparse(ast.parse(text, mode="eval")))
    return found


def _of_shapes(program: ExportedProgram, inputs: Inputs) -> Iterator[str]:
    """Sizes and values that are constants of the graph, sizes that must be equal, and limits of sizes."""
    first: dict[str, str] = {}
    for node, place in zip(inputs.flat, inputs.places, strict=True):
        value: Any = node.meta["val"]
        if not isinstance(value, Tensor):
            if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                yield _equals(place, value)
            continue
        yield f"isinstance({place}, torch.Tensor)"
        yield f"{place}.dim() == {value.dim()}"
        # A model may ask for the dtype; indices may be of any.
        integers = (torch.int64, torch.int32, torch.int16, torch.int8)
        yield f"{place}.dtype in {integers}" if value.dtype in integers else f"{place}.dtype == {value.dtype}"
        for dimension, size in enumerate(value.shape):
            here = f"{place}.size()[{dimension}]"
            if isinstance(size, int):
                yield f"{here} == {size}"
            elif (symbol := str(size)) in first:
                yield f"{here} == {first[symbol]}"
            else:
                first[symbol] = here
                limits = program.range_constraints.get(size.node.expr)
                # Below 3, torch.export only excludes 0 and 1 as constants.
                if limits is not None and limits.lower.is_finite and int(limits.lower) > 2:
                    yield f"{here} >= {int(limits.lower)}"
                if limits is not None and limits.upper.is_finite and limits.upper.is_Integer:
                    yield f"{here} <= {int(limits.upper)}"
