"""Capture one call of a model with the adapters that it has: each rotated weight is a node `hra_fx::rotate`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, fx, nn

from hra_fx.compat import pytree
from hra_fx.errors import AdapterError
from hra_fx.export.editors import ModuleEditor, is_adapter_tensor
from hra_fx.export.insert import find_rotate_nodes
from hra_fx.export.match import group_tied
from hra_fx.export.ops import ROTATE
from hra_fx.export.weight_uses import module_path
from hra_fx.layers.adapted_layer import AdaptedLayer, layer_class_for
from hra_fx.layers.class_swap import set_class, unswap
from hra_fx.layers.target import META, REFLECTION, NodeTag, describe
from hra_fx.layers.variants import QuantizedAdapters
from hra_fx.model.example_inputs import Call
from hra_fx.model.graph_module import restore
from hra_fx.model.state import adapted_layers
from hra_fx.tracing.trace_model import export_call
from hra_fx.tracing.unchanged import Snapshot

_ADVICE = (
    "Without example_inputs, hra_fx.graphs and hra_fx.visualize use torch.fx, and show the parts that it can trace."
)


def capture_call(model: nn.Module, call: Call) -> fx.GraphModule:
    """Capture one call of a model with `torch.export`, with the adapters that are active.

    Args:
        model: a model, adapted or not; it is not changed.
        call: the example call.

    Returns:
        A graph of ATen operators over the model's own parameters and buffers, which is called as the model is. It has
        one node `hra_fx::rotate` for each active adapter of a layer, with a `NodeTag`. An adapter that is merged, or at
        scale 0, has none. A quantized layer has the operators of its reflections. An output that holds something that
        `torch.export` does not know, such as the cache of a language model, is `None`.

    Raises:
        AdapterError: `torch.export` cannot capture the call.

    Example:
        >>> import torch
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> module = capture_call(model, ((torch.ones(1, 6),), {}))
        >>> [node.name for node in module.graph.nodes if node.op == "call_function"]
        ['rotate', 'linear']
    """
    layers = adapted_layers(model)
    if stacked := next((layer for layer in layers.values() if layer.hra_u.kind == "experts"), None):
        raise AdapterError(
            f"{describe(stacked)}: a graph of torch.export cannot have the reflections of experts. Leave out "
            "example_inputs, or fold the model first (hra_fx.fold)."
        )
    with _plain_layers(model, [part for part in layers.values() if not isinstance(part.hra_u, QuantizedAdapters)]):
        captured = export_call(model, call, _ADVICE)
    paths = {layer: path for path, layer in layers.items()}
    own_names: dict[fx.Node, str] = {}
    for node in reversed(find_rotate_nodes(captured.graph)):
        if not node.users:  # the call does not read this weight
            captured.graph.erase_node(node)
            continue
        path = _layer_path(node)
        layer: Any = model.get_submodule(path)
        node.meta[META] = NodeTag(paths[layer], layer.hra_u.kind, "reflection")
        min(node.users).prepend(node)
        own_names[node] = f"{path}.{layer.hra_u.weight_name}".lstrip(".")
    return _read_by_own_names(captured, own_names)


@contextmanager
def _plain_layers(model: nn.Module, layers: Collection[AdaptedLayer]) -> Iterator[None]:
    """A block in which layers have their original class, and `W Q` in place of their weight while the model runs.

    `W Q` is computed once for a call of the model, before its forward, so that a layer that is called twice, or whose
    weight is read elsewhere, has one node.
    """
    with ExitStack() as undo:
        undo.callback(Snapshot(model).restore)
        for part in list(model.modules()):
            if isinstance(part, fx.GraphModule):  # its own graph has the reflections
                undo.callback(setattr, part, "graph", part.graph)
                part.graph = copy.deepcopy(part.graph)
                restore(part)
        for layer in layers:
            undo.callback(set_class, layer, type(layer))
            unswap(layer, layer_class_for(layer))
        model.forward = _with_rotated_weights(model.forward, layers)
        yield


def _with_rotated_weights(forward: Callable[..., Any], layers: Collection[AdaptedLayer]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        for layer in layers:  # an attribute, which is read before a parameter of the same name
            vars(layer)[layer.hra_u.weight_name] = _rotated_weight(layer)
        try:
            return _without_unknown(forward(*args, **kwargs))
        finally:
            for layer in layers:
                vars(layer).pop(layer.hra_u.weight_name, None)

    return run


def _rotated_weight(layer: AdaptedLayer) -> Tensor:
    """`W Q` by one operator for each adapter in use."""
    adapters = layer.hra_u
    weight: Tensor = adapters.weight_of(layer)
    for name in adapters.active:
        if name not in adapters.scales:
            vectors, anchor, apply_GS = adapters[name], adapters.anchor(name), adapters.specs[name].apply_GS
            weight = ROTATE(weight, vectors, anchor, apply_GS, adapters.columns)
        elif (chain := adapters.chain(name)).shape[1]:  # at scale 0 the chain is empty
            weight = ROTATE(weight, chain, None, False, adapters.columns)
    return weight


def _without_unknown(output: Any) -> Any:
    """An output of a model with None for the values in it, such as caches, that `torch.export` refuses."""
    known = (Tensor, int, float, str, type(None))
    kept = pytree.tree_map(lambda value: value if isinstance(value, known) else None, output)
    return output if kept is None else kept


def _read_by_own_names(captured: fx.GraphModule, rotated: Mapping[fx.Node, str]) -> fx.GraphModule:
    """Have each operator read a tied weight by the name that it has in the layer around it.

    torch.export reads a tied weight by one of its names. A fold of the graph writes to the name that is rotated, which
    no other layer may read, and a picture shows an operator at the layer whose weight it reads.

    Args:
        captured: the graph, which is modified.
        rotated: rotation -> the name of the weight of its layer.
    """
    editor = ModuleEditor(captured)
    own = {name: tensor for name, tensor in editor.parameters.items() if not is_adapter_tensor(name)}
    for names in group_tied(own):
        reads = [node for name in names for node in editor.weights.get(name, ())] if len(names) > 1 else []
        free = [name for name in names if name not in rotated.values()]
        for read in reads:
            for user in list(read.users):
                last = str(read.target).rpartition(".")[2]
                name = rotated.get(user, f"{module_path(user)}.{last}")
                user.replace_input_with(read, editor.weight_node(name if name in names else (free or names)[0]))
    return editor.build()


def _layer_path(rotate: fx.Node) -> str:
    """The path of the layer whose vectors a node reads, one of several for a shared layer."""
    vectors = rotate.args[1]
    assert isinstance(vectors, fx.Node)
    return str(vectors.target).rpartition(".")[0].removesuffix(REFLECTION).rstrip(".")
