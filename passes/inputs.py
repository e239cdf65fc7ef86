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
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import children_of, guard_function, guards_of, pytree
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call
from hra_fx.passes.compare import Limits

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


def call_of(program: ExportedProgram) -> Call:
    """The arguments of a program, with each flat input replaced by its number."""
    spec: Any = program.call_spec.in_spec
    call: Call = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return call


class Inputs(NamedTuple):
    """The inputs of a graph.

    Attributes:
        arguments: the placeholders, in the order of the model's signature.
        flat: the nodes of the values in them.
        places: for each flat value, its Python expression, with the names of the arguments.
        conditions: those on the structure of the arguments, as expressions.
    """

    arguments: list[fx.Node]
    flat: list[fx.Node]
    places: list[str]
    conditions: list[str]


def nest(graph: fx.Graph, program: ExportedProgram, model: nn.Module) -> Inputs:
    """Add the nested arguments and results of a program to its graph, in place."""
    parameters = inspect.signature(model.forward).parameters
    names = argument_names(model, *call_of(program))
    specs = [spec for part in children_of(program.call_spec.in_spec) for spec in children_of(part)]
    old = list(graph.find_nodes(op="placeholder"))
    flat, made = iter(old), Inputs([], [], [], [])
    start = old[-1].next if old else next(iter(graph.nodes))
    for name, default in _with_skipped(parameters, names):
        with graph.inserting_before(old[0] if old else start):
            argument = graph.placeholder(name, default_value=default)
        made.arguments.append(argument)
        if name not in names:
            made.conditions.append(f"{name} is None" if default is None else f"{name} == {default!r}")
            continue
        with graph.inserting_before(start):
            for value, place in _leaves(graph, argument, specs[names.index(name)], name, made.conditions):
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
    last = max((by_place.index(name) for name in names if name in by_place), default=-1)
    skipped = [name for name in by_place[: last + 1] if name not in names]
    for name in skipped:
        if not isinstance(parameters[name].default, (bool, int, float, str, type(None))):
            raise CaptureError(f"its argument {name!r} has a default that a graph cannot have. Pass it in the example")
    order = [*by_place[: last + 1], *(name for name in names if name not in by_place)]
    for name in order if skipped else names:
        is_behind = bool(skipped) and name in by_place and by_place.index(name) > by_place.index(skipped[0])
        yield name, parameters[name].default if name in skipped or is_behind else empty


def _leaves(
    graph: fx.Graph, value: fx.Node, spec: Any, place: str, conditions: list[str]
) -> Iterator[tuple[fx.Node, str]]:
    """Create nodes for the values in an argument, each with its place; add the conditions on its containers."""
    if spec.is_leaf():
        yield value, place
        return
    if spec.type not in (tuple, list, dict):
        raise CaptureError(f"its input {place!r} contains a {spec.type.__name__}, which a graph cannot unpack")
    keys = spec.context if spec.type is dict else range(spec.num_children)
    test = f"set({place}) == {set(keys)!r}" if keys and spec.type is dict else f"len({place}) == {len(keys)}"
    conditions.append(f"isinstance({place}, {spec.type.__name__}) and {test}")
    for key, child in zip(keys, children_of(spec), strict=True):
        item = graph.call_function(operator.getitem, (value, key))
        yield from _leaves(graph, item, child, f"{place}[{key!r}]", conditions)


def _nested(graph: fx.Graph, spec: Any, results: Iterator[Any]) -> Any:
    """Create an argument of the output node: containers, and calls of output classes."""
    if spec.is_leaf():
        return next(results)
    children = [_nested(graph, child, results) for child in children_of(spec)]
    if spec.type in (tuple, list):
        return spec.type(children)
    if spec.type is dict:
        return dict(zip(spec.context, children, strict=True))
    if spec.type is namedtuple:
        made = graph.call_function(spec.context, tuple(children))
    elif spec.type is OrderedDict:
        made = graph.call_function(OrderedDict, (dict(zip(spec.context, children, strict=True)),))
    elif issubclass(spec.type, dict) and spec.type is not defaultdict:  # the outputs of transformers and diffusers
        made = graph.call_function(spec.type, (), dict(zip(spec.context, children, strict=True)))
    else:
        raise CaptureError(f"it returns a {spec.type.__name__}, which a graph cannot create")
    made.meta["is_wrapped"] = True  # so that it stays a node when fx unpickles the graph
    return made


# --- conditions -------------------------------------------------------------------------------------------------------


class InputChecks(nn.Module):
    """Checks the inputs of a graph."""

    #: Keeps the call in `graph.eliminate_dead_code()`, which would otherwise remove it because its result is not used.
    _is_impure = True

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

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the function, which is created from the conditions."""
        return {name: value for name, value in vars(self).items() if name != "_check"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Create the function again."""
        vars(self).update(state)
        self.add(())


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
    for index in sorted(limits.same_dtype):
        made.append(f"{inputs.places[index]}.dtype == {inputs.flat[index].meta['val'].dtype}")
    made += [f"{inputs.places[index]}.is_contiguous()" for index in sorted(limits.contiguous)]
    if not limits.under_autocast:
        made.append("not torch.is_autocast_enabled('cpu') and not torch.is_autocast_enabled('cuda')")
    return made


def conditions_of(program: ExportedProgram, model: nn.Module, inputs: Inputs) -> list[str]:
    """The conditions on the inputs of a program."""
    args, kwargs = call_of(program)
    given = dict(zip(argument_names(model, args, kwargs), (*args, *kwargs.values()), strict=True))
    # Each expression that torch.export may use for an input -> the index of this input.
    sources: dict[str, int] = {}
    variadic: dict[str, int] = {}
    for index, (path, _) in enumerate(pytree.tree_flatten_with_path(given)[0]):
        sources[f"L['flat_args'][{index}]"] = sources[f"L{pytree.keystr(path)}"] = index
        name, _, place = path[0].key.rpartition("_")
        if place.isdigit():  # an item of *args, or an argument with such a name
            variadic[f"L['{name}'][{place}]{pytree.keystr(path[1:])}"] = index
    found = list(inputs.conditions)
    # The code of `torch.export` reads inputs from `L`.
    for original in dict.fromkeys([*_of_shapes(program, inputs.flat), *guards_of(program)]):
        text = original.replace("\n", "")
        # Those of known inputs first: a guess may be a prefix of one.
        for source, index in (sources | variadic | sources).items():
            text = text.replace(source, inputs.places[index])
        found.append(ast.unparse(ast.parse(text, mode="eval")))
    return found


def _of_shapes(program: ExportedProgram, inputs: list[fx.Node]) -> Iterator[str]:
    """Sizes and values that are constants of the graph, sizes that must be equal, and limits of sizes."""
    first: dict[str, str] = {}
    for index, node in enumerate(inputs):
        value: Any = node.meta["val"]
        source = f"L['flat_args'][{index}]"
        if not isinstance(value, Tensor):
            if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                yield f"{source} == {value!r}" if value is not None else f"{source} is None"
            continue
        yield f"isinstance({source}, torch.Tensor)"
        yield f"{source}.dim() == {value.dim()}"
        # Numeric and boolean masks have different meanings, so have images of bytes, and a model may check the kind.
        if value.is_floating_point() or value.is_complex():
            yield f"{source}.dtype.is_floating_point == {value.is_floating_point()}"
        elif value.dtype in (torch.bool, torch.uint8):
            yield f"{source}.dtype == {value.dtype}"
        else:
            yield f"{source}.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)"
        for dimension, size in enumerate(value.shape):
            here = f"{source}.size()[{dimension}]"
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
