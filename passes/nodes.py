"""Helpers for the nodes of graphs: where they come from in the model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import fx

#: Code that is not the model's.
_NOT_OF_MODELS = (Path(torch.__file__).parent, Path(__file__).parents[1], Path(contextlib.__file__))


def attribute(owner: Any, path: Any) -> Any:
    """Look up an attribute by its dotted path; `None` if it does not exist."""
    return reduce(lambda part, name: getattr(part, name, None), str(path).split("."), owner)


def replace_node(node: fx.Node, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
    """Replace a node with a new one that has its `meta`."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node(op, target, args, kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


def normalize_path(path: str) -> str:
    """Convert a path of `nn_module_stack` (`L['self']._modules['blocks'][0]`) to the form of `named_modules`."""
    path = path.replace("__dict__['_modules']", "")  # of a `ModelGraph`, in strict mode
    for before, after in (("L['self']", ""), ("._modules[", "["), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


def line_of(node: fx.Node) -> str:
    """The line of the model's code that recorded a node, as a part of an error message; "" if it is unknown."""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n\s*(.*)', node.meta.get("stack_trace") or "")
    return line_among((file, int(line), code) for file, line, code in frames)


def line_among(frames: Iterable[tuple[str, int | None, str | None]]) -> str:
    """The innermost line of the model's code among (file, line, code), as a part of an error message."""
    for name, line, code in reversed(list(frames)):
        is_other = name.startswith("<") or any(Path(name).is_relative_to(folder) for folder in _NOT_OF_MODELS)
        if line and not is_other:
            return f" at {Path(name).name}, line {line}, `{(code or '').strip()}`"
    return ""
