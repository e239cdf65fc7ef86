"""GraphModules that share the modules and parameters of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from hra_fx.compat import NON_PERSISTENT
from hra_fx.errors import CaptureError
from hra_fx.layers.adapter_states import check_states
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.target import BASE_WEIGHT
from hra_fx.passes.modes import ByMode
from hra_fx.selection.origin import keep_origin, origin_of

#: What fx changes in copies: it makes all tensors that are read at the root persistent buffers, and drops other names.
_KEPT = ("_parameters", "_buffers", NON_PERSISTENT, "_modules")


class UnpicklingTracer(fx.Tracer):
    """Traces the code of a graph, as fx does to unpickle it. Reads of buffers and of base weights are nodes."""

    proxy_buffer_attributes = True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Create a node. fx would read the base weight as `layer.weight`, which is `W Q` while a model runs."""
        if isinstance(m, HouseholderAdapters) and "weight" in kwargs:
            layer = self.path_of_module(m).rpartition(".")[0]
            kwargs = {"weight": self.create_proxy("get_attr", f"{layer}.{BASE_WEIGHT}", (), {})}
        return super().call_module(m, forward, args, kwargs)


class ModelGraph(fx.GraphModule):
    """A graph whose copies and pickles have its own `state_dict`."""

    def __getattr__(self, name: str) -> Any:
        """Look up a parameter, buffer or module."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            text = f"{error}. This is a graph of one call: use the original model, which has the same layers."
            raise AttributeError(text, name=name, obj=self) from None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Check the whole state before anything is loaded."""
        check_states(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        """Copy the module."""
        made = super().__deepcopy__(memo)
        vars(made).update(copy.deepcopy(_tensors_of(vars(self)), memo))
        return made

    def __reduce__(self) -> Any:
        """Pickle it as fx does, by its code, and add the tensors that fx would convert."""
        return _unpickled, super().__reduce__()


def _tensors_of(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in _KEPT or isinstance(value, Tensor)}


def _unpickled(make: Any, args: Any) -> fx.GraphModule:
    made: fx.GraphModule = make(*args)
    name = type(made).__name__
    made.__class__ = type(ModelGraph.__new__(ModelGraph))  # fx makes a class for each graph
    type(made).__name__ = name
    made.recompile()
    vars(made).update(_tensors_of(args[0]))
    return made


def graph_module(root: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Create a GraphModule with the modules and parameters of `root`, with the same names in the same order.

    `modules` are those that the graph calls but `root` does not have.

    The order determines the name of a shared layer for a configuration, and the states of an optimizer. fx itself keeps
    only the modules that the graph uses, in the order of the graph. If the graph only reads the weight of a layer, fx
    replaces the layer with an empty module, without the adapters.
    """
    if taken := next((name for name in modules if hasattr(root, name)), None):
        raise CaptureError(f"its attribute {taken!r} has a name that a graph uses for itself. Rename it")
    graph._tracer_cls = UnpicklingTracer
    module = ModelGraph(nn.Module(), fx.Graph(tracer_cls=UnpicklingTracer), type(root).__name__)
    for kind in ("_parameters", "_buffers", NON_PERSISTENT):
        vars(module)[kind] = copy.copy(vars(root)[kind])
    vars(module)["_modules"] = dict(root._modules)
    for name, part in modules.items():
        module.add_module(name, part.train(root.training))
    for node in graph.find_nodes(op="get_attr"):
        if not hasattr(module, name := str(node.target).partition(".")[0]):
            setattr(module, name, getattr(root, name))  # a tensor that is not a buffer
    module.training = root.training
    module.graph = graph
    keep_origin(module, origin_of(root))
    called = {
        part for node in graph.find_nodes(op="call_module") for part in module.get_submodule(node.target).modules()
    }
    for part in modules.values():
        if isinstance(part, ByMode) and repr(part.in_train) != repr(part.in_eval):
            part.parts = tuple(own for own in module.modules() if own is not module and own not in called)
    return module
