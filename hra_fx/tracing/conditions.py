"""The conditions on the inputs of a program of `torch.export`, as expressions over its inputs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from hra_fx.compat import guards_of, pytree
from hra_fx.tracing.input_checks import Condition
from hra_fx.tracing.signature import call_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def conditions_of(program: ExportedProgram, names: list[str], places: list[fx.Node]) -> list[Condition]:
    """What must hold for the inputs of a program.

    Args:
        program: the program.
        names: the names of its arguments.
        places: the nodes of its flat inputs.
    """
    args, kwargs = call_of(program)
    given = dict(zip(names, (*args, *kwargs.values()), strict=True))
    paths = [path for path, _ in pytree.tree_flatten_with_path(given)[0]]
    sources = {}
    for index, path in enumerate(paths):
        sources[f"L['flat_args'][{index}]"] = sources[f"L{pytree.keystr(path)}"] = index
        name, _, place = path[0].key.rpartition("_")
        if place.isdigit():  # one of *args
            sources[f"L['{name}'][{place}]{pytree.keystr(path[1:])}"] = index
    shown = [f"{path[0].key}{pytree.keystr(path[1:])}" for path in paths]
    found = dict.fromkeys([*_of_shapes(program, places), *guards_of(program)])
    return [_condition(code, sources, shown) for code in found]


def more_than_one(index: int, dimension: int, names: list[str]) -> Condition:
    """That a size of an input is not 1.

    Args:
        index: that of the flat input.
        dimension: the dimension of the size.
        names: the names of the arguments, which are those of the inputs where none is nested.
    """
    name = names[index] if index < len(names) else f"input {index}"
    return Condition(f"args[{index}].size()[{dimension}] != 1", f"{name}.size()[{dimension}] != 1")


def _condition(code: str, sources: dict[str, int], names: list[str]) -> Condition:
    text = code = code.replace("\n", "")
    for source, index in sources.items():
        code = code.replace(source, f"args[{index}]")
        text = text.replace(source, names[index])
    text = ast.unparse(ast.parse(text, mode="eval"))
    return Condition(code, text)


def _of_shapes(program: ExportedProgram, places: list[fx.Node]) -> Iterator[str]:
    """Sizes and values that are constants of the graph, sizes that must be equal, and limits of sizes."""
    first: dict[str, str] = {}
    for index, place in enumerate(places):
        value: Any = place.meta["val"]
        source = f"L['flat_args'][{index}]"
        if not isinstance(value, Tensor):
            if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                yield f"{source} == {value!r}" if value is not None else f"{source} is None"
            continue
        yield f"{source}.dim() == {value.dim()}"
        yield _kind(source, value.dtype)
        for dimension, size in enumerate(value.shape):
            here = f"{source}.size()[{dimension}]"
            if isinstance(size, int):
                yield f"{here} == {size}"
            elif (symbol := str(size)) in first:
                yield f"{here} == {first[symbol]}"
            else:
                first[symbol] = here
                yield from _limits(program, size, here)


def _kind(source: str, dtype: torch.dtype) -> str:
    """Masks of numbers and of booleans mean different things, and a model may ask which one it has."""
    if dtype.is_floating_point or dtype.is_complex:
        return f"{source}.dtype.is_floating_point == {dtype.is_floating_point}"
    return f"({source}.dtype == torch.bool) == {dtype is torch.bool} and not {source}.dtype.is_floating_point"


def _limits(program: ExportedProgram, size: Any, source: str) -> Iterator[str]:
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return
    if limits.lower.is_finite and int(limits.lower) > 2:  # below, torch.export only excludes 0 and 1 as constants
        yield f"{source} >= {int(limits.lower)}"
    if limits.upper.is_finite and limits.upper.is_Integer:
        yield f"{source} <= {int(limits.upper)}"
