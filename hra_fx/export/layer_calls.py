"""Operators of a captured graph, replaced by calls of layers of torch over the same parameters.

    y = aten.linear(x, encoder.0.weight, encoder.0.bias)        becomes        y = encoder.0(x)

Operators that use a weight in another form still read it, by its name in the layer that they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import non_persistent_buffers, schema_of
from hra_fx.export.match import GraphLayer
from hra_fx.export.skeleton import CONVOLUTIONS
from hra_fx.export.weight_uses import WeightUse, module_path
from hra_fx.layers.target import LayerKind

_aten = torch.ops.aten
_SETTINGS = ("stride", "padding", "dilation", "groups")


class _Call(NamedTuple):
    """An operator that a layer can compute.

    Attributes:
        node: the operator.
        x: the name of the argument that is the input of the layer.
        bias: the node of its bias, or `None`.
        settings: the other arguments, of a convolution.
    """

    node: fx.Node
    x: str
    bias: Any
    settings: dict[str, Any]


def call_layers(module: fx.GraphModule, layers: Iterable[GraphLayer], parameters: Mapping[str, Tensor]) -> list[str]:
    """Put layers into a module and call them in its graph, in place.

    Args:
        module: a graph of operators; its submodules only hold tensors.
        layers: its layers. Each is called where an operator uses its weight as it is, with the bias of the same layer.
        parameters: qualified name -> parameter; tied ones are the same object.

    Returns:
        The paths of the layers that are called.
    """
    found = {layer: _calls(layer, module, parameters) for layer in layers}
    called = {layer: calls for layer, calls in found.items() if calls}
    for layer, (first, *more) in called.items():
        made = _make_layer(layer.kind, module.get_submodule(layer.path), first.settings)
        for path in (layer.path, *layer.aliases):
            module.set_submodule(path, made)
        for call in (first, *(call for call in more if call.settings == first.settings)):
            _replace(call, layer.path)
    for layer in called:
        _read_by_own_names(module.graph, layer)
    _call_embeddings(module)
    return [layer.path for layer in called]


def _calls(layer: GraphLayer, module: nn.Module, parameters: Mapping[str, Tensor]) -> list[_Call]:
    """The operators that the layer can compute; it has the bias of its name or none."""
    bias = module.get_submodule(layer.path)._parameters.get("bias")
    calls = [call for use in layer.uses if (call := _call(use))]
    return [call for call in calls if _tensor(call.bias, parameters) is bias]


def _call(use: WeightUse) -> _Call | None:
    """The operator at the end of a use as the call of a layer, `None` if it uses another form of the weight."""
    node = use.consumer
    given = _arguments(node)
    if given.get("weight") is use.weight:
        settings = {name: _plain(given[name]) for name in _SETTINGS if name in given}
        is_constant = all(isinstance(value, (int, str, tuple)) for value in settings.values())
        return _Call(node, "input", given["bias"], settings) if is_constant else None
    if use.transposed or given.get("mat2") is not use.first_user:
        return None
    # What torch decomposes a linear layer into: mm(x, t(w)), or addmm(bias, x, t(w)).
    if node.target is _aten.mm.default:
        return _Call(node, "self", None, {})
    if node.target is _aten.addmm.default and given["alpha"] == given["beta"] == 1:
        return _Call(node, "mat1", given["self"], {})
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by their names, with its defaults."""
    schema = schema_of(node.target)
    arguments = () if schema is None else schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    names = [argument.name for argument in arguments]
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _plain(setting: Any) -> Any:
    """A setting of a convolution as its class takes it; not an int, str or tuple if it depends on a size."""
    if not isinstance(setting, (list, tuple)):
        return setting
    values = tuple(setting)
    if not all(isinstance(value, int) for value in values):
        return None
    return values[0] if len(values) == 1 else values


def _tensor(node: Any, parameters: Mapping[str, Tensor]) -> Any:
    """The parameter that a node reads, `None` without a node, and the node itself if it reads no parameter."""
    return parameters.get(str(node.target), node) if isinstance(node, fx.Node) else node


def _make_layer(kind: LayerKind, holder: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A layer of torch over the tensors of the module that held them."""
    weight: Any = holder._parameters["weight"]
    options: Any = {"bias": holder._parameters.get("bias") is not None, "device": "meta", **settings}
    if kind == "linear":
        return _filled(nn.Linear(weight.shape[1], weight.shape[0], **options), holder)
    channels = weight.shape[1] * settings["groups"]
    return _filled(CONVOLUTIONS[kind](channels, weight.shape[0], tuple(weight.shape[2:]), **options), holder)


def _filled(layer: nn.Module, holder: nn.Module) -> nn.Module:
    for held in ("_parameters", "_buffers", "_modules"):
        vars(layer)[held].update(vars(holder)[held])
    for name in non_persistent_buffers(holder):
        layer.register_buffer(name, layer._buffers[name], persistent=False)
    return layer


def _read_by_own_names(graph: fx.Graph, layer: GraphLayer) -> None:
    """Read the weight by the name that it has in the layer of each use."""
    for use, name in (*((use, layer.name) for use in layer.uses), *layer.others):
        if use.weight.target == name or use.weight not in use.first_user.all_input_nodes:
            continue
        with graph.inserting_before(use.first_user):
            read = graph.get_attr(name)
        read.meta = dict(use.weight.meta)
        use.first_user.replace_input_with(use.weight, read)


def _call_embeddings(module: fx.GraphModule) -> None:
    """Call embeddings too: fx unpickles a read of a tied weight as a read by its first name, which may be rotated."""
    for node in module.graph.find_nodes(op="call_function", target=_aten.embedding.default):
        given, path = _arguments(node), module_path(node) or ""
        if given["weight"].op != "get_attr" or given["weight"].target != f"{path}.weight":
            continue
        holder = module.get_submodule(path)
        if not isinstance(holder, nn.Embedding):
            padding = None if given["padding_idx"] == -1 else given["padding_idx"]
            options: Any = {name: given[name] for name in ("scale_grad_by_freq", "sparse")} | {"padding_idx": padding}
            rows, width = holder._parameters["weight"].shape  # type: ignore[union-attr]
            module.set_submodule(path, _filled(nn.Embedding(rows, width, **options, device="meta"), holder))
        _replace(_Call(node, "indices", None, {}), path)


def _replace(call: _Call, path: str) -> None:
    graph = call.node.graph
    with graph.inserting_before(call.node):
        made = graph.call_module(path, (_arguments(call.node)[call.x],))
    made.meta = dict(call.node.meta)
    call.node.replace_all_uses_with(made)
    graph.erase_node(call.node)
