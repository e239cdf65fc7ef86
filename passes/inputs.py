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
import itertools
import operator
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import children_of, guard_function, guards_of, pytree
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call

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


def nest(graph: fx.Graph, program: ExportedProgram, names: list[str]) -> list[fx.Node]:
    """Add the nested arguments and results of a program to its graph, in place. Returns the nodes of the inputs."""
    flat = iter(graph.find_nodes(op="placeholder"))
    specs = [spec for part in children_of(program.call_spec.in_spec) for spec in children_of(part)]
    inputs: list[fx.Node] = []
    for name, spec in zip(names, specs, strict=True):
        parts = list(itertools.islice(flat, spec.num_leaves))
        if spec.is_leaf():
            parts[0].target = name
        inputs += parts if spec.is_leaf() else _unpacked(graph, name, spec, parts)
    end: Any = graph.output_node()
    results = iter(end.args[0])
    with graph.inserting_before(end):
        end.args = (_nested(graph, program.call_spec.out_spec, results),)
    graph.set_codegen(fx.graph.CodeGen())
    return inputs


def _unpacked(graph: fx.Graph, name: str, spec: Any, parts: list[fx.Node]) -> list[fx.Node]:
    """Replace the placeholders of the tensors in a nested input with one placeholder and nodes that unpack it."""
    with graph.inserting_before(parts[0] if parts else next(iter(graph.nodes))):
        made = list(_leaves(graph, graph.placeholder(name), spec))
    for old, new in zip(parts, made, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    return made


def _leaves(graph: fx.Graph, value: fx.Node, spec: Any) -> Iterator[fx.Node]:
    """Create nodes for the tensors in a nested input."""
    if spec.is_leaf():
        yield value
        return
    if spec.type not in (tuple, list, dict):
        raise CaptureError(f"its input {value.name!r} contains a {spec.type.__name__}, which a graph cannot unpack")
    keys = spec.context if spec.type is dict else range(spec.num_children)
    for key, child in zip(keys, children_of(spec), strict=True):
        yield from _leaves(graph, graph.call_function(operator.getitem, (value, key)), child)


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
    elif issubclass(spec.type, dict):  # the outputs of transformers and diffusers
        made = graph.call_function(spec.type, (), dict(zip(spec.context, children, strict=True)))
    else:
        raise CaptureError(f"it returns a {spec.type.__name__}, which a graph cannot create")
    made.meta["is_wrapped"] = True  # so that it stays a node when fx unpickles the graph
    return made


# --- conditions -------------------------------------------------------------------------------------------------------


class Condition(NamedTuple):
    """A condition on the inputs of a graph.

    Attributes:
        code: a Python expression of `args`, the inputs of the graph.
        text: the same expression with the names of the inputs.
    """

    code: str
    text: str


class InputChecks(nn.Module):
    """Checks the inputs of a graph."""

    #: Keeps the call in `graph.eliminate_dead_code()`, which would otherwise remove it because its result is not used.
    _is_impure = True

    def __init__(self, conditions: Sequence[Condition]) -> None:
        """Store the conditions."""
        super().__init__()
        self.conditions: tuple[Condition, ...] = ()
        self.add(conditions)

    def forward(self, *args: Any) -> None:
        """Check all inputs."""
        self._check(*args)

    def add(self, conditions: Sequence[Condition]) -> None:
        """Add conditions."""
        self.conditions = tuple(dict.fromkeys([*self.conditions, *conditions]))
        self._check = guard_function(_code(self.conditions))

    def extra_repr(self) -> str:
        """Show the conditions."""
        return ", ".join(condition.text for condition in self.conditions)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the function, which is created from the conditions."""
        return {name: value for name, value in vars(self).items() if name != "_check"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Create the function again."""
        vars(self).update(state)
        self.add(())


def _code(conditions: Sequence[Condition]) -> str:
    """The source of a function that asserts all conditions."""
    lines = ["def check(*args):"]
    for condition in conditions:
        message = (
            f"the graph was captured for inputs with `{condition.text}`. Call the original model, or capture it "
            "for these inputs: pass them as `example_inputs` to hra_fx.transform(..., trace=True), or to "
            "torch.export.export."
        )
        lines.append(f"    torch._assert({condition.code}, {message!r})")
    return "\n".join([*lines, "    return None"])


def size_conditions(
    names: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]], not_one: Sequence[frozenset[int]]
) -> list[Condition]:
    """The conditions that sizes are not 0, and that those in a set of `not_one` are not all 1."""
    args, made = [f"args[{index}]" for index in range(len(names))], []
    for chosen in [frozenset([which]) for which in range(len(sizes))] + [some for some in not_one if len(some) > 1]:
        places = [
            (index, f".size()[{dimension}] > {int(chosen in not_one)}")
            for (index, dimension), *_ in (sizes[which] for which in chosen)
        ]
        code, text = (" or ".join(f"{shown[index]}{rest}" for index, rest in places) for shown in (args, names))
        made.append(Condition(code, text))
    return made


def conditions_of(
    program: ExportedProgram, names: list[str], inputs: list[fx.Node]
) -> tuple[list[Condition], list[str]]:
    """The conditions on the flat inputs of a program, and their names, with the keys of nested ones."""
    args, kwargs = call_of(program)
    given = dict(zip(names, (*args, *kwargs.values()), strict=True))
    paths = [path for path, _ in pytree.tree_flatten_with_path(given)[0]]
    # Each expression that torch.export may use for an input -> the index of this input.
    sources: dict[str, int] = {}
    variadic: dict[str, int] = {}
    for index, path in enumerate(paths):
        sources[f"L['flat_args'][{index}]"] = sources[f"L{pytree.keystr(path)}"] = index
        name, _, place = path[0].key.rpartition("_")
        if place.isdigit():  # an item of *args, or an argument with such a name
            variadic[f"L['{name}'][{place}]{pytree.keystr(path[1:])}"] = index
    shown = [f"{path[0].key}{pytree.keystr(path[1:])}" for path in paths]
    found: list[Condition] = []
    # The code of `torch.export` reads inputs from `L`.
    for original in dict.fromkeys([*_of_shapes(program, inputs), *guards_of(program)]):
        text = code = original.replace("\n", "")
        # Those of known inputs first: a guess may be a prefix of one.
        for source, index in (sources | variadic | sources).items():
            code = code.replace(source, f"args[{index}]")
            text = text.replace(source, shown[index])
        found.append(Condition(code, ast.unparse(ast.parse(text, mode="eval"))))
    return found, shown


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
        yield f"{source}.dim() == {value.dim()}"
        # Numeric and boolean masks have different meanings, and a model may check the kind of dtype.
        if value.is_floating_point() or value.is_complex():
            yield f"{source}.dtype.is_floating_point == {value.is_floating_point()}"
        else:
            is_bool = f"({source}.dtype == torch.bool) == {value.dtype is torch.bool}"
            yield f"{is_bool} and not {source}.dtype.is_floating_point"
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
