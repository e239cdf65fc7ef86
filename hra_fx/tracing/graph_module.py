"""A GraphModule that shares the modules of another module, with whole layers where a graph reads only a weight."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.tracing.trace import Traced


def graph_module(root: nn.Module, traced: Traced) -> fx.GraphModule:
    """A GraphModule over what a graph uses of `root`, under the same names.

    fx itself makes an empty module to hold a weight that is read, which would have no adapters.
    """
    holder = nn.Module()
    holder.__dict__.update({**vars(root), "_modules": {**root._modules, **traced.modules}})
    module = fx.GraphModule(holder, traced.graph, type(root).__name__)
    for node in traced.graph.find_nodes(op="get_attr"):
        path = str(node.target).rpartition(".")[0]
        if path:
            module.set_submodule(path, holder.get_submodule(path))
    shared = set(root.modules())
    for part in module.modules():  # a part of the model may be frozen in eval mode
        if part not in shared:
            part.training = root.training
    return module
