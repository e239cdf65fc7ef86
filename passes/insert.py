r"""insert: the reflection before each marked call.

    y = layer(x)        becomes        h = layer.hra_u(x);  y = layer(x, h)

For a Linear, `h = x Q^T` and the layer computes `h W^T = x (W Q)^T`. For a Conv2d, `h` holds the coordinates of the
patches and the layer subtracts their image (`hra_fx.reflection.Conv2dReflection`). The layer still gets `x` as its
first argument, so that hooks on it see what they saw before.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.errors import GraphInvariantError
from hra_fx.site import META, REFLECTION, SiteNote


class InsertPass(PassBase):
    """Gives every call that `match` marked its reflection, one visible node a call; a second run changes nothing."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        marked = [node for node in graph_module.graph.nodes if _is_bare(node)]
        for node in marked:
            _insert(graph_module.graph, node)
        if marked:
            graph_module.recompile()
        return PassResult(graph_module, bool(marked))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()


def _is_bare(node: fx.Node) -> bool:
    note = node.meta.get(META)
    return isinstance(note, SiteNote) and note.role == "layer" and len(node.args) + len(node.kwargs) == 1


def _insert(graph: fx.Graph, node: fx.Node) -> None:
    note: SiteNote = node.meta[META]
    value = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(value, fx.Node):
        raise GraphInvariantError(
            f"node {node.name!r}: the call of {note.path} has no traced input. Exclude this layer, or report the model."
        )
    with graph.inserting_before(node):
        reflection = graph.create_node("call_module", f"{node.target}.{REFLECTION}", (value,), {})
    reflection.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    reflection.meta[META] = SiteNote(note.path, note.kind, "reflection")
    node.args, node.kwargs = (value, reflection), {}
