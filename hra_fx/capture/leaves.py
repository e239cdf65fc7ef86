"""Modules that a graph calls as they are: what they give must be known, for a traced value is never None.

Nor is it ever a tuple, whatever the call gives when it runs.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hra_fx.capture.solid import ends_with_return
from hra_fx.carrier.swap import original_class
from hra_fx.errors import CaptureError
from hra_fx.sources import reached_methods

#: Expressions that may be a tensor; a constant, a tuple and their like are none.
_POSSIBLE = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Name, ast.Subscript, ast.Attribute)


def why_not_called(module: nn.Module) -> str | None:
    """Why the call of a module cannot be a node, if it cannot: its class is not torch's, and may give no tensor.

    Example:
        >>> why_not_called(nn.Linear(2, 2)) is None
        True
    """
    kind: Any = original_class(module)
    if kind.forward.__module__.startswith("torch.") or _gives_a_tensor(kind):
        return None
    return "its class has a forward of its own, which by its source need not give a tensor"


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
    """What a call gives in a trace: an attention without weights gives None beside its output.

    Args:
        module: the module that is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        result: the traced value that stands for all of it.

    Raises:
        CaptureError: a value decides whether there are weights.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return result
    wanted = kwargs["need_weights"] if "need_weights" in kwargs else args[4] if len(args) > 4 else True
    if type(wanted) is not bool:
        raise CaptureError("a value decides whether an attention gives its weights")
    return result if wanted else (result[0], None)


@functools.cache
def _gives_a_tensor(kind: Any) -> bool:
    """Whether every way through a forward ends with what may be a tensor, and is not seen to be another thing."""
    forward = reached_methods(kind).get("forward")
    if forward is None or not ends_with_return(forward.body):
        return False
    nodes = list(ast.walk(forward))
    assigned: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(node.value)
    values = [node.value for node in nodes if isinstance(node, ast.Return)]
    named = [value for returned in values if isinstance(returned, ast.Name) for value in assigned.get(returned.id, [])]
    return all(isinstance(value, _POSSIBLE) for value in [*values, *named])
