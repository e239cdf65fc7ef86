"""Nested inputs and outputs as nodes of a graph.

`torch.export` flattens the arguments and the result of a call outside of its graph. A plain graph, which fx can copy
and pickle, has nodes for both:

    input_ids = placeholder;  boxes = placeholder;  first = boxes[0]
    ...
    output = CausalLMOutputWithPast(logits=linear)
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import namedtuple
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import Call

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def argument_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The names of the arguments of a call, in its order; those of `*args` are numbered.

    Example:
        >>> argument_names(nn.Bilinear(2, 2, 2), (1,), {"input2": 2})
        ['input1', 'input2']
    """
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(args) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(names) < len(args):
            names.append(parameter.name)
    return [*names, *kwargs]


def call_of(program: ExportedProgram) -> Call:
    """The arguments of a program, with the number of each flat input in its place.

    Example:
        >>> import torch
        >>> call_of(torch.export.export(nn.Bilinear(2, 2, 2), (torch.ones(1, 2),), {"input2": torch.ones(1, 2)}))
        ((0,), {'input2': 1})
    """
    spec: Any = program.call_spec.in_spec
    call: Call = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return call


def nest(graph: fx.Graph, program: ExportedProgram, names: list[str]) -> list[fx.Node]:
    """Give a graph the nested arguments and results of its program, in place.

    Args:
        graph: the graph of the program's module, with one placeholder for each tensor.
        program: the program.
        names: the names of its arguments.

    Returns:
        The nodes of the flat inputs.

    Raises:
        CaptureError: a graph cannot create or take apart an argument or a result of this type.
    """
    flat = iter(graph.find_nodes(op="placeholder"))
    specs = [spec for part in program.call_spec.in_spec.children() for spec in part.children()]
    inputs: list[fx.Node] = []
    for name, spec in zip(names, specs, strict=True):
        parts = list(itertools.islice(flat, spec.num_leaves))
        if spec.is_leaf():
            parts[0].target = name
        inputs += parts if spec.is_leaf() else _taken_apart(graph, name, spec, parts)
    end: Any = graph.output_node()
    results = iter(end.args[0])
    with graph.inserting_before(end):
        end.args = (_nested(graph, program.call_spec.out_spec, results),)
    graph.set_codegen(fx.graph.CodeGen())
    return inputs


def _taken_apart(graph: fx.Graph, name: str, spec: Any, parts: list[fx.Node]) -> list[fx.Node]:
    """Replace the placeholders of the tensors in a nested input by one, and nodes that take it apart."""
    with graph.inserting_before(parts[0] if parts else next(iter(graph.nodes))):
        made = list(_leaves(graph, graph.placeholder(name), spec))
    for old, new in zip(parts, made, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    return made


def _leaves(graph: fx.Graph, value: fx.Node, spec: Any) -> Iterator[fx.Node]:
    """Nodes for the tensors in a nested input."""
    if spec.is_leaf():
        yield value
        return
    if spec.type not in (tuple, list, dict):
        raise CaptureError(f"its input {value.name!r} holds a {spec.type.__name__}, which a graph cannot take apart")
    keys = spec.context if spec.type is dict else range(spec.num_children)
    for key, child in zip(keys, spec.children(), strict=True):
        yield from _leaves(graph, graph.call_function(operator.getitem, (value, key)), child)


def _nested(graph: fx.Graph, spec: Any, results: Iterator[Any]) -> Any:
    """An argument of the output node: containers, and calls of the classes of outputs."""
    if spec.is_leaf():
        return next(results)
    children = [_nested(graph, child, results) for child in spec.children()]
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
