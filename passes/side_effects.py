"""Which nodes of a graph do more than to compute a value."""

from __future__ import annotations

import inspect
import operator

from torch import fx

from hra_fx.compat import is_higher_order, schema_of

_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
) | {operator.itruediv, operator.ixor, operator.setitem, operator.delitem}


_SWITCHES = ("_enter_", "_exit_", "_set_", "set_")


def grad_mode_after(node: fx.Node, mode: bool | None) -> bool | None:
    """Whether gradients are on after a node, given that before; `None` where nobody can tell any more.

    Autocast makes no difference to that.
    """
    if node.op != "call_function":
        return mode
    name = str(getattr(node.target, "__name__", node.target))
    if not name.startswith(_SWITCHES) or name in ("_enter_autocast", "_exit_autocast"):
        return mode
    if name == "_set_grad_enabled" and isinstance(node.args[0], bool):
        return node.args[0]
    return None


def writes(node: fx.Node) -> bool:
    """Whether a node may change what others give: it writes into a tensor, or sets how operators compute.

    What cannot be told from its name is taken for one: a node that nobody reads, or a call of a module.

    Example:
        >>> graph = fx.symbolic_trace(lambda x: (x + 1).add_(2)).graph
        >>> [node.name for node in graph.nodes if writes(node)]
        ['add_']
    """
    if node.op == "call_method":
        return _is_in_place(str(node.target))
    if node.op != "call_function":
        return node.op == "call_module"
    if node.target in _IN_PLACE or "out" in node.kwargs or _is_asked_in_place(node):
        return True
    if is_higher_order(node.target):  # a body of its own, which may do anything
        return True
    if getattr(node.target, "__module__", None) in ("_operator", "builtins"):
        return False
    schema = schema_of(node.target)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(getattr(node.target, "__name__", node.target))
    if name.startswith(("is_", "_is_")):
        return False
    return not node.users or _is_in_place(name) or name.startswith(_SWITCHES)


def _is_asked_in_place(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is called with `inplace`, by name or by place."""
    if node.kwargs.get("inplace"):
        return True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # of builtins, whose names tell
        return False
    return bool(given.arguments.get("inplace"))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
