r"""absorb: a layer reflects by itself what it reads, where nobody else reads the reflection.

    h = layer.hra_u(x);  y = layer(x, h)      becomes      y = layer(x)

It computes the same (`hra_fx.layers.adapted_layer`), and in training by fewer nodes of autograd. For a graph that is run; one
that is shown or rewritten further keeps its reflections.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import META, SiteNote


class AbsorbPass(PassBase):
    """Takes reflections out that the call of their layer makes up for; a second run changes nothing."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        calls = [node for node in graph_module.graph.nodes if _is_absorbing(node)]
        for node in calls:
            value, reflection = node.args
            node.args = (value,)
            graph_module.graph.erase_node(reflection)
        if calls:
            graph_module.recompile()
        return PassResult(graph_module, bool(calls))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """The graph is well formed."""
        graph_module.graph.lint()


def _is_absorbing(node: fx.Node) -> bool:
    """Whether it is the call of a layer with its reflection, which has no other reader."""
    note = node.meta.get(META)
    if not isinstance(note, SiteNote) or note.role != "layer" or len(node.args) != 2:
        return False
    reflection = node.args[1]
    if not isinstance(reflection, fx.Node):
        return False
    inner = reflection.meta.get(META)
    is_reflection = isinstance(inner, SiteNote) and inner.role == "reflection"
    return is_reflection and reflection.args == node.args[:1] and list(reflection.users) == [node]
