"""`transform` and `fold`, in place, of a captured `fx.GraphModule` of ATen operators, such as `program.module()`.

Its submodules only hold parameters, which the graph reads by `get_attr`. Parameters are replaced by new ones on the
same memory, so the program and the model that they come from do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from hra_fx.config import HRAConfig
from hra_fx.export.fold import compute_folded_weights
from hra_fx.export.insert import (
    AdapterNodes,
    find_rotate_nodes,
    insert_rotation,
    remove_rotation,
    split_shared_uses,
)
from hra_fx.export.match import GraphLayer, group_tied, parent_path
from hra_fx.export.metadata import get_metadata, has_adapter, with_metadata, without_metadata
from hra_fx.export.select import InitialAdapter, init_adapter, select_layers
from hra_fx.layers.adapters import ANCHOR, check_adapter_name
from hra_fx.layers.target import REFLECTION

G = TypeVar("G", bound=fx.GraphModule)


def is_captured(value: object) -> bool:
    """Whether a value is a `GraphModule` of ATen operators that read parameters, without calls of layers.

    Example:
        >>> is_captured(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
        False
        >>> is_captured(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module())
        True
    """
    return isinstance(value, fx.GraphModule) and any(
        isinstance(user.target, torch._ops.OpOverload) for node in _weight_nodes(value) for user in node.users
    )


def transform_captured(module: G, config: HRAConfig, adapter_name: str = "default") -> G:
    """Add reflections to a captured graph, in place: each selected weight is replaced by `W Q`.

    The `state_dict` gains the keys of `transform_program`. The parameters are new objects on the same memory, frozen.

    Args:
        module: a graph of ATen operators, with the parameter names of the model that was captured.
        config: which layers, how many reflections, and the initialization.
        adapter_name: name of the adapter, part of its parameters' names.

    Returns:
        `module`.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the graph.
        UnsupportedLayerError: a selected layer does not support reflections.
        AdapterError: the graph has another adapter. After any error the module is unchanged.

    Example:
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> module = transform_captured(module, HRAConfig(r=2, target_modules=["0"]))
        >>> [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default']
    """
    check_adapter_name(adapter_name)
    if has_adapter(module, config, adapter_name):
        return module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights: dict[str, list[fx.Node]] = {}
    for node in _weight_nodes(module):
        weights.setdefault(str(node.target), []).append(node)
    layers = select_layers(module.graph, weights, parameters, config)
    adapters = [init_adapter(layer, parameters[layer.name], config) for layer in layers]
    for layer, initial in zip(layers, adapters, strict=True):
        weight = _get_node(module.graph, layer.source, weights)
        adapter = _add_adapter(module, layer, initial, adapter_name, weight)
        insert_rotation(module.graph, layer, weight, adapter, apply_GS=config.apply_GS)
    split_shared_uses(layers, lambda name: _get_node(module.graph, name, weights))
    _move_before_users(module.graph)
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    _set_trainable(module, parameters, set())
    module.meta = with_metadata(module, config, adapter_name, trainable)
    module.recompile()
    return module


def fold_captured(module: G) -> G:
    """Fold the reflections of a captured graph into its weights, in place; the folded weights are new tensors.

    Args:
        module: a graph of `transform_captured`, or the module of a program of `transform_program`.

    Returns:
        `module`.

    Raises:
        AdapterError: the graph has no reflections.
        FoldError: a folded weight would not be finite. The module is unchanged.

    Example:
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> list(fold_captured(transform_captured(module, HRAConfig(r=2, target_modules=["0"]))).state_dict())
        ['0.weight', '0.bias']
    """
    nodes = find_rotate_nodes(module.graph)
    folded = compute_folded_weights(nodes, lambda name: _get_tensor(module, name), lambda node: str(node.target))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in nodes:
        for leftover in remove_rotation(module.graph, node):
            _remove_if_unused(module, leftover)
    read = {str(node.target) for node in _weight_nodes(module) if node.users}
    remaining = {name: tensor for name, tensor in parameters.items() if f".{REFLECTION}." not in name}
    for names in group_tied(remaining):
        new = {name: nn.Parameter(folded[name]) for name in names if name in folded}
        if len(new) == 1:  # also for tied names that no node reads
            new |= {name: weight for weight in new.values() for name in names if name not in read}
        for name, weight in new.items():
            _set_parameter(module, name, weight)
            remaining[name] = weight
    metadata = get_metadata(module)
    if metadata is not None:
        _set_trainable(module, remaining, set(metadata["trainable"]))
    module.meta = without_metadata(module)
    module.recompile()
    return module


def _weight_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that read a parameter."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [node for node in module.graph.find_nodes(op="get_attr") if node.target in parameters]


def _get_node(graph: fx.Graph, name: str, weights: dict[str, list[fx.Node]]) -> fx.Node:
    """The first node that reads a parameter; created if there is none (tied names, dead code elimination)."""
    if name not in weights:
        with graph.inserting_before(next(iter(graph.nodes))):
            weights[name] = [graph.get_attr(name)]
    return weights[name][0]


def _move_before_users(graph: fx.Graph) -> None:
    """Move each `get_attr` node before its first user, which may have read another node before."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        first = min(node.users, key=order.__getitem__, default=node)
        if order[first] < order[node]:
            first.prepend(node)


def _add_adapter(
    module: fx.GraphModule, layer: GraphLayer, initial: InitialAdapter, adapter_name: str, weight: fx.Node
) -> AdapterNodes:
    owner = module.get_submodule(layer.path)
    if REFLECTION not in owner._modules:
        owner.add_module(REFLECTION, nn.Module())
    container = owner.get_submodule(REFLECTION)
    container.register_parameter(adapter_name, nn.Parameter(initial.vectors, requires_grad=initial.trainable))
    name = f"{layer.path}.{REFLECTION}.{adapter_name}"
    with module.graph.inserting_after(weight):
        vectors = module.graph.get_attr(name)
        if initial.anchor is None:
            return AdapterNodes(vectors, None)
        container.register_buffer(adapter_name + ANCHOR, initial.anchor)
        return AdapterNodes(vectors, module.graph.get_attr(name + ANCHOR))


def _remove_if_unused(module: fx.GraphModule, node: fx.Node) -> None:
    """Remove a tensor of an adapter that has no users, and its container with the last one."""
    if node.users:
        return
    path, _, name = str(node.target).rpartition(".")
    module.graph.erase_node(node)
    container = module.get_submodule(path)
    delattr(container, name)
    if not [*container.parameters(), *container.buffers()]:
        del module.get_submodule(parent_path(path))._modules[REFLECTION]


def _set_trainable(module: fx.GraphModule, parameters: Mapping[str, Tensor], trainable: set[str]) -> None:
    """Set which parameters require gradients; changed ones are new objects on the same memory."""
    for names in group_tied(parameters):
        tensor, wanted = parameters[names[0]], not trainable.isdisjoint(names)
        if tensor.requires_grad != wanted:
            alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
            for name in names:
                _set_parameter(module, name, alias)


def _get_tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter
