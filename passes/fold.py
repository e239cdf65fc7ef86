"""fold: remove the reflections from a graph after they are folded into the weights."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from hra_fx.layers.target import FACTORS, META, NodeTag, weight_name


class FoldPass(PassBase):
    """Undoes `insert`. The result is the graph of the base model, node for node and without marks."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph and recompile it."""
        graph = graph_module.graph
        noted = [node for node in graph.nodes if isinstance(node.meta.get(META), NodeTag)]
        # In reverse order, so that a reflection of an input does not have readers when it is erased.
        for node in reversed(noted):
            note: NodeTag = node.meta.pop(META)
            if note.role == "layer":
                node.args = node.args[:1]
            elif note.role == "weight":
                node.target = f"{str(node.target).rpartition('.')[0]}.{weight_name(note.kind)}"
            elif note.role == "reflection":
                if node.users:  # a reflection of a weight
                    node.replace_all_uses_with(node.kwargs["weight"])
                graph.erase_node(node)
        factors = graph.find_nodes(op="call_module", target=FACTORS)
        for node in factors:
            graph.erase_node(node)
        if is_changed := bool(noted or factors):
            graph_module.recompile()
        return PassResult(graph_module, is_changed)
