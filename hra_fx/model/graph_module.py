"""A `fx.GraphModule` that calls adapted layers: insert their reflections into its graph, in place, and remove them.

Its first node computes the factors of all layers in batches:

    f = hra_factors();  ...;  h = layer.hra_u(x, f);  y = layer(x, h)

The forward of an adapted model does the same before it calls the forward of its class. The class of a `GraphModule` is
not changed, because fx creates a separate class for each copy.
"""

from __future__ import annotations

import copy
import operator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import fx, nn

from hra_fx.compat import is_exporting, is_replica
from hra_fx.errors import AdapterError
from hra_fx.kernels.dispatch import is_plain_eager
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.batching import start_of_forward
from hra_fx.layers.running import Run
from hra_fx.layers.target import BASE_WEIGHT, FACTORS
from hra_fx.model.state import is_adapted
from hra_fx.passes.fold import FoldPass
from hra_fx.passes.insert import InsertPass
from hra_fx.passes.match import find_uses


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
        if not self.state.active:
            return None
        return start_of_forward(self.state.layers)


class UnpicklingTracer(fx.Tracer):
    """Traces the code of a graph, as fx does to unpickle it. Reads of buffers and of base weights are nodes."""

    proxy_buffer_attributes = True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Create a node. fx would read the base weight as `layer.weight`, which is `W Q` while a model runs."""
        if isinstance(m, HouseholderAdapters) and "weight" in kwargs:
            layer = self.path_of_module(m).rpartition(".")[0]
            kwargs = {"weight": self.create_proxy("get_attr", f"{layer}.{BASE_WEIGHT}", (), {})}
        return super().call_module(m, forward, args, kwargs)


class GraphOfMode(nn.Module):
    """Runs one graph in train mode and another in eval mode, with the same layers.

    The graphs are not registered as children, because the model already has their layers under the same names.
    """

    #: Keeps calls without results in `graph.eliminate_dead_code()`.
    _is_impure = True
    in_train: fx.GraphModule
    in_eval: fx.GraphModule

    def __init__(self, in_train: fx.GraphModule, in_eval: fx.GraphModule) -> None:
        """Store both graphs."""
        super().__init__()
        vars(self).update(in_train=in_train, in_eval=in_eval)

    def forward(self, *args: Any) -> Any:
        """Run the graph of the current mode."""
        # The modules whose operations the two graphs contain (set by `hra_fx.tracing.graph_module`). If one of them has
        # another mode, neither graph is right.
        for path, module in self.__dict__.get("followed", {}).items():
            if module.training != self.training:
                raise AdapterError(
                    f"{path} has another mode than the graph, and runs different operations in both modes. Set one "
                    "mode for the whole graph, or use the original model."
                )
        return (self.in_train if self.training else self.in_eval)(*args)


def graph_in_eval(module: fx.GraphModule) -> fx.Graph:
    """A copy of a graph for eval mode, with the nodes of its parts that run one graph in each mode."""
    graph = copy.deepcopy(module.graph)
    for call in reversed(graph.find_nodes(op="call_module")):  # a part may read a result that only train mode has
        part = module.get_submodule(str(call.target))
        if not isinstance(part, GraphOfMode):
            continue
        inner = part.in_eval.graph
        with graph.inserting_before(call):
            found: Any = graph.graph_copy(inner, dict(zip(inner.find_nodes(op="placeholder"), call.args, strict=True)))
        picks = [user for user in call.users if user.target is operator.getitem] if isinstance(found, tuple) else []
        for node, value in [*((pick, found[pick.args[1]]) for pick in picks), (call, found)]:
            for user in list(node.users):
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), partial(_replaced, node, value))
            graph.erase_node(node)
    return graph


def _replaced(old: fx.Node, new: Any, node: fx.Node) -> Any:
    return new if node is old else node


def rewrite(module: fx.GraphModule, undo: ExitStack) -> None:
    """Insert the reflections of all adapted layers into the graph, instead of the ones that it has."""
    for part in _graphs(module):
        undo.callback(setattr, part, "graph", part.graph)
        graph = copy.deepcopy(part.graph)
        vars(part)["_tracer_cls"] = graph._tracer_cls = UnpicklingTracer
        part.graph = graph
    remove_reflections(module)
    if FACTORS not in module._modules:
        module.add_module(FACTORS, BatchedFactors())
        undo.callback(module._modules.pop, FACTORS, None)
    insert(module)


def insert(module: fx.GraphModule) -> None:
    """Insert the reflections of all adapted layers that the graph uses."""
    for part in _graphs(module):
        InsertPass(find_uses(part, lambda _, layer: is_adapted(layer)))(part)


def remove_reflections(module: fx.GraphModule) -> None:
    """Remove all reflections from a graph."""
    for part in _graphs(module):
        FoldPass()(part)


def _graphs(module: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph, and the two that it runs if the modes have different nodes."""
    modes = [part for part in module.modules() if isinstance(part, GraphOfMode)]
    return [module, *(graph for part in modes for graph in (part.in_train, part.in_eval))]
