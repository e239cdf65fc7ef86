"""Which nodes of a graph have side effects."""

from __future__ import annotations

import inspect
import operator

from torch import fx

from hra_fx.compat import is_higher_order, schema_of

_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
) | {operator.itruediv, operator.ixor, operator.setitem, operator.delitem}


#: Prefixes of functions that change how operators compute.
_MODE_PREFIXES = ("_enter_", "_exit_", "_set_", "set_")


def grad_mode_after(node: fx.Node, mode: bool | None) -> bool | None:
    """The gradient mode after a node, given the mode before; `None` if it is unknown. Autocast does not change it."""
    if node.op != "call_function":
        return mode
    name = str(getattr(node.target, "__name__", node.target))
    if not name.startswith(_MODE_PREFIXES) or name in ("_enter_autocast", "_exit_autocast"):
        return mode
    if name == "_set_grad_enabled" and isinstance(node.args[0], bool):
        return node.args[0]
    return None


def has_side_effects(node: fx.Node) -> bool:
    """Whether a node may change the values of other nodes: it writes to a tensor, or changes how operators compute.

    Unknown nodes count as such: calls of modules, and functions whose value has no users.

    Example:
        >>> graph = fx.symbolic_trace(lambda x: (x + 1).add_(2)).graph
        >>> [node.name for node in graph.nodes if has_side_effects(node)]
        ['add_']
    """
    if node.op == "call_method":
        return _is_in_place(str(node.target))
    if node.op != "call_function":
        return node.op == "call_module"
    if node.target in _IN_PLACE or "out" in node.kwargs or _has_inplace_argument(node):
        return True
    if is_higher_order(node.target):  # has a body that may do anything
        return True
    if getattr(node.target, "__module__", None) in ("_operator", "builtins"):
        return False
    schema = schema_of(node.target)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(getattr(node.target, "__name__", node.target))
    if name.startswith(("is_", "_is_")):
        return False
    return not node.users or _is_in_place(name) or name.startswith(_MODE_PREFIXES)


def _has_inplace_argument(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is called with `inplace=True`, by keyword or position."""
    if node.kwargs.get("inplace"):
        return True
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins; their names show it
        return False
    return bool(given.arguments.get("inplace"))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
