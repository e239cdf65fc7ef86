"""A `fx.GraphModule` that calls adapted layers: insert their reflections into its graph, in place, and remove them.

Its first node computes the factors of all layers in batches:

    f = hra_factors();  ...;  h = layer.hra_u(x, f);  y = layer(x, h)

The forward of an adapted model does the same before it calls the forward of its class. The class of a `GraphModule` is
not changed, because fx creates a separate class for each copy.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

from torch import fx, nn

from hra_fx.compat import is_exporting, is_replica
from hra_fx.kernels.dispatch import is_plain_eager
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.batching import start_of_forward
from hra_fx.layers.mixed import CURRENT
from hra_fx.layers.running import Run
from hra_fx.layers.target import BASE_WEIGHT, FACTORS, META, REFLECTION, LayerTarget, NodeTag
from hra_fx.model.state import adapted_layers
from passes.fold import FoldPass
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


class BatchedFactors(nn.Module):
    """Computes the factors of all layers of a graph. It does not have parameters or children."""

    # fx keeps a call without users for such modules. The child holds the state of the model.
    _is_impure = True

    def __init__(self) -> None:
        """Start without layers; `attach_state` sets the state of the model."""
        super().__init__()
        self.state: Any = None

    def forward(self) -> Run | None:
        """Return the factors, or `None` if each layer computes its own, for example under torch.compile."""
        if self.state is None or self.state.disabled or is_replica(self) or is_exporting() or not is_plain_eager():
            return None
        if not self.state.active and CURRENT.batch is None:
            return None
        return start_of_forward(self.state.layers)


def rewrite(module: fx.GraphModule, undo: ExitStack) -> None:
    """Insert the reflections of all adapted layers into the graph, instead of the ones that it has."""
    undo.callback(setattr, module, "graph", module.graph)
    module.graph = copy.deepcopy(module.graph)
    remove_reflections(module)
    if FACTORS not in module._modules:
        module.add_module(FACTORS, BatchedFactors())
        undo.callback(module._modules.pop, FACTORS, None)
    insert(module, module)


def insert(module: fx.GraphModule, model: nn.Module, path: str = "") -> None:
    """Insert the reflections of the adapted layers of `model` into the graph of its module at `path`."""
    adapted = {
        layer: LayerTarget(name, layer.hra_u.kind, layer.hra_u.reflects_input)
        for name, layer in adapted_layers(model).items()
    }
    # All paths, because the graph may call a shared layer by any path.
    names = model.named_modules(remove_duplicate=False)
    targets = {name: adapted[part] for name, part in names if isinstance(part, AdaptedLayer) and part in adapted}
    for step in (MatchPass(targets, path), InsertPass(), VerifyPass()):
        step(module)


def remove_reflections(module: fx.GraphModule) -> None:
    """Remove all reflections from a graph."""
    _restore_tags(module)
    FoldPass()(module)


def tag_adapted_layers(module: nn.Module) -> frozenset[str]:
    """Mark the adapted layers in the graph of a `GraphModule`, and return their paths; empty for other modules."""
    if not isinstance(module, fx.GraphModule):
        return frozenset()
    _restore_tags(module)
    notes = [node.meta.get(META) for node in module.graph.nodes]
    return frozenset(path for note in notes if isinstance(note, NodeTag) for path in (note.path, *note.also))


def _restore_tags(module: fx.GraphModule) -> None:
    """Restore the marks that a pickle does not contain: fx pickles the code of a graph, not the `meta` of its nodes."""
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
