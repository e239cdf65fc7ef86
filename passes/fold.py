"""fold: remove the reflections from a graph, for example after they are folded into the weights."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import FACTORS, REFLECTION, weight_entry


class FoldPass(PassBase):
    """Undoes `insert`. The result is the graph of the base model, node for node."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        is_changed = False
        # In reverse order, so that a reflection of an input does not have readers when it is erased.
        for node in reversed(graph.find_nodes(op="call_module")):
            layer, _, child = str(node.target).rpartition(".")
            if child == REFLECTION:
                _remove(node, layer, weight_entry(layer, graph_module.get_submodule(layer)))
            elif node.target == FACTORS:
                graph.erase_node(node)
            elif isinstance(experts := graph_module.get_submodule(str(node.target)), ExpertsWeight):
                node.op, node.target = "get_attr", weight_entry(str(node.target), experts)
            else:
                continue
            is_changed = True
        if is_changed:
            graph_module.recompile()
        return PassResult(graph_module, is_changed)


def _remove(reflection: fx.Node, layer: str, weight: str) -> None:
    if isinstance(base := reflection.kwargs.get("weight"), fx.Node):
        base.target = weight
        reflection.replace_all_uses_with(base)
    for user in list(reflection.users):
        if user.target == layer:
            user.args = user.args[:1]
    reflection.graph.erase_node(reflection)
