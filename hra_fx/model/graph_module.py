"""Insert reflections into the graph of a `fx.GraphModule` that calls layers, in place.

The class of the GraphModule itself is not swapped, because fx gives each copy a class of its own.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import fx, nn

from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, META, REFLECTION, LayerTarget, NodeTag
from hra_fx.model.graph_factors import add_factors, connect_factors
from hra_fx.model.state import adapted_layers
from passes.fold import FoldPass
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


def rewrite(module: fx.GraphModule, undo: ExitStack | None = None) -> None:
    """Insert the reflections of all adapted layers into the graph, in place of those that it has."""
    before, graph = module.graph, copy.deepcopy(module.graph)
    if undo is not None:
        undo.callback(setattr, module, "graph", before)
    module.graph = graph
    remove_reflections(module)
    add_factors(module, undo)
    insert(module, module)
    connect_factors(module)


def insert(module: fx.GraphModule, model: nn.Module, path: str = "") -> None:
    """Insert the reflections of the adapted layers of a model into the graph of one of its modules.

    Args:
        module: the graph.
        model: the model.
        path: path in the model of the module whose forward the graph is.
    """
    adapted = {
        layer: LayerTarget(name, layer.hra_u.kind, layer.hra_u.is_called)
        for name, layer in adapted_layers(model).items()
    }
    # All paths, because the graph may call a shared layer by any of them.
    names = model.named_modules(remove_duplicate=False)
    targets = {name: adapted[part] for name, part in names if isinstance(part, AdaptedLayer) and part in adapted}
    for step in (MatchPass(targets, path), InsertPass(), VerifyPass()):
        step(module)


def restore(module: nn.Module) -> None:
    """Make a `GraphModule` one without adapters again; other modules have nothing to remove."""
    if isinstance(module, fx.GraphModule):
        remove_reflections(module)
        module._modules.pop(FACTORS, None)


def remove_reflections(module: fx.GraphModule) -> None:
    """Remove all reflections from a graph."""
    _restore_tags(module)
    FoldPass()(module)


def tag_adapted_layers(module: nn.Module) -> frozenset[str]:
    """The paths of the adapted layers in the graph of a `GraphModule`; none for other modules."""
    if not isinstance(module, fx.GraphModule):
        return frozenset()
    _restore_tags(module)
    notes = [node.meta.get(META) for node in module.graph.nodes]
    return frozenset(path for note in notes if isinstance(note, NodeTag) for path in (note.path, *note.also))


def _restore_tags(module: fx.GraphModule) -> None:
    """Restore the marks that a pickle has lost: fx keeps the code of a graph, not the `meta` of its nodes."""
    paths = {layer: path for path, layer in adapted_layers(module).items()}
    for node in module.graph.find_nodes(op="call_module"):
        layer = str(node.target).removesuffix(f".{REFLECTION}")
        called: Any = module.get_submodule(layer)
        if layer == node.target or META in node.meta or called not in paths:
            continue
        path, kind = paths[called], called.hra_u.kind
        node.meta[META] = NodeTag(path, kind, "reflection")
        weight = node.kwargs.get("weight")
        if isinstance(weight, fx.Node):
            if str(weight.target).endswith(f".{BASE_WEIGHT}"):  # a parameter of experts is read by its own name
                weight.meta[META] = NodeTag(path, kind, "weight")
            continue
        for user in node.users:
            user.meta[META] = NodeTag(path, kind, "layer")
