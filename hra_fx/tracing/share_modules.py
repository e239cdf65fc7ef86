"""A GraphModule over the modules of another one, with layers whole of which a graph reads the weight alone."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.layers.adapted_layer import SiteCarrier


def over(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule that shares what `graph` uses of `root`, under the same names.

    fx itself makes an empty module to hold a weight that is read, which would have no reflections.
    """
    module = fx.GraphModule(root, graph, name)
    owners = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for path in owners - {""}:
        if isinstance(layer := root.get_submodule(path), SiteCarrier):
            module.set_submodule(path, layer)
    return module
