"""verify: check the invariants of a rewritten graph, from the graph alone."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, META, REFLECTION, NodeTag


class VerifyPass(PassBase):
    """Checks the invariants of a graph without changing it.

    The invariants are: the graph is well formed; every marked call reads one reflection, which belongs to its own layer
    and has the same input as the layer; only calls of its layer read the reflection of an input; every marked weight is
    read by exactly one reflection, which belongs to its own layer; nodes that call a reflection or read a base weight
    are marked.

    Raises:
        GraphInvariantError: an invariant is violated. The message names the node.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Check every node."""
        graph_module.graph.lint()
        for node in graph_module.graph.nodes:
            note = node.meta.get(META)
            if not isinstance(note, NodeTag):
                if node.op == "call_module" and str(node.target).endswith(f".{REFLECTION}"):
                    raise _broken(node, "calls a reflection but is not marked")
                if node.op == "get_attr" and str(node.target).endswith(f".{BASE_WEIGHT}"):
                    raise _broken(node, "reads a base weight but is not marked")
            elif note.role == "layer":
                _check_layer(node)
            elif note.role == "weight":
                _check_weight(node)
            elif note.role == "reflection":
                _check_reflection(node)
        return PassResult(graph_module, False)


def _check_layer(node: fx.Node) -> None:
    if len(node.args) != 2 or node.kwargs:
        raise _broken(
            node,
            f"calls an adapted layer with {len(node.args)} arguments, expected the input and its reflection",
        )
    value, reflection = node.args
    if not isinstance(reflection, fx.Node) or reflection.target != f"{node.target}.{REFLECTION}":
        raise _broken(node, f"calls {node.target} with {reflection}, which is not a reflection of that layer")
    first, *factors = reflection.args
    if first is not value or [getattr(node, "target", None) for node in factors] not in ([], [FACTORS]):
        raise _broken(node, f"reads {value}, but its reflection reads {reflection.args[0]}")


def _check_weight(node: fx.Node) -> None:
    layer, _, name = str(node.target).rpartition(".")
    if name != BASE_WEIGHT:
        raise _broken(node, f"reads {node.target}, expected {BASE_WEIGHT} and its reflection")
    others = [user for user in node.users if user.target != f"{layer}.{REFLECTION}"]
    if others or len(node.users) != 1:
        read = f"is read by {others[0].name!r}" if others else f"has {len(node.users)} reflections"
        raise _broken(node, f"is the weight of an adapted layer but {read}, expected one reflection")


def _check_reflection(node: fx.Node) -> None:
    layer = str(node.target).removesuffix(f".{REFLECTION}")
    if not node.users:
        raise _broken(node, "is an unused reflection")
    if isinstance(weight := node.kwargs.get("weight"), fx.Node) and weight.target == f"{layer}.{BASE_WEIGHT}":
        return
    for user in node.users:
        if user.target != layer:
            raise _broken(node, f"is a reflection of {layer} but is read by {user.name!r}")


def _broken(node: fx.Node, rule: str) -> GraphInvariantError:
    return GraphInvariantError(f"node {node.name!r}: {rule}. This is a bug in hra_fx; please open an issue.")
