"""Which nodes of a graph do more than to compute a value."""

from __future__ import annotations

import operator

from torch import fx

_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
) | {operator.itruediv, operator.ixor, operator.setitem, operator.delitem}


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
    if node.target in _IN_PLACE or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    if getattr(node.target, "__module__", None) in ("_operator", "builtins"):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = str(getattr(node.target, "__name__", node.target))
    if name.startswith(("is_", "_is_")):
        return False
    return not node.users or _is_in_place(name) or name.startswith(("_enter_", "_set_", "set_"))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
