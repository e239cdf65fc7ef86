"""`transform` and `fold` of a captured `fx.GraphModule` of aten operators, such as `program.module()`, in place.

Its modules hold parameters only, and its graph reads them by `get_attr`. Parameters are replaced by others on the same
memory, so that the program and the model that they came from stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, fx, nn

from hra_fx.compat import OpOverload
from hra_fx.config import HRAConfig
from hra_fx.export.fold import folded_weights
from hra_fx.export.insert import Tensors, insert, remove, rotations, separate
from hra_fx.export.match import GraphSite, groups_of, owner_of
from hra_fx.export.select import Start, choose, is_done, note_of, start, with_note, without_note
from hra_fx.layers.adapters import ANCHOR, check_adapter_name
from hra_fx.layers.target import REFLECTION

G = TypeVar("G", bound=fx.GraphModule)


def is_captured(value: object) -> bool:
    """Whether a value is a `GraphModule` whose operators read parameters themselves, and not by calls of layers.

    Example:
        >>> is_captured(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))))
        False
        >>> is_captured(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).module())
        True
    """
    return isinstance(value, fx.GraphModule) and any(
        isinstance(user.target, OpOverload) for node in _weights(value) for user in node.users
    )


def transform_captured(module: G, config: HRAConfig, adapter_name: str = "default") -> G:
    """Insert reflections into a captured graph, in place: each selected weight acts as `W Q` from now on.

    The `state_dict` gains the keys of `transform_program`. The parameters are new objects on the same memory, frozen.

    Args:
        module: a graph of aten operators, whose weights are called as in the model that was captured.
        config: which layers, how many reflections, and how they start.
        adapter_name: name of the adapter, a part of its parameters' names.

    Returns:
        `module`.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the graph.
        UnsupportedLayerError: a selected layer cannot be adapted rightly.
        AdapterError: the graph has another adapter. After any error the module is as it was.

    Example:
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> module = transform_captured(module, HRAConfig(r=2, target_modules=["0"]))
        >>> [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default']
    """
    check_adapter_name(adapter_name)
    if is_done(module, config, adapter_name):
        return module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights: dict[str, list[fx.Node]] = {}
    for node in _weights(module):
        weights.setdefault(str(node.target), []).append(node)
    sites = choose(module.graph, weights, parameters, config)
    starts = [start(site, parameters[site.name], config) for site in sites]
    for site, fresh in zip(sites, starts, strict=True):
        weight = _read(module.graph, site.source, weights)
        insert(module.graph, site, weight, _add(module, site, fresh, adapter_name, weight), apply_GS=config.apply_GS)
    separate(sites, lambda name: _read(module.graph, name, weights))
    _hoist(module.graph)
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    _give_gradient(module, parameters, set())
    module.meta = with_note(module, config, adapter_name, trainable)
    module.recompile()
    return module


def fold_captured(module: G) -> G:
    """Take the reflections out of a captured graph, in place, and put them into its weights, which are new tensors.

    Args:
        module: a graph of `transform_captured`, or the module of a program of `transform_program`.

    Returns:
        `module`.

    Raises:
        AdapterError: the graph has no reflections.
        FoldError: a weight would not be finite. The module is as it was.

    Example:
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> list(fold_captured(transform_captured(module, HRAConfig(r=2, target_modules=["0"]))).state_dict())
        ['0.weight', '0.bias']
    """
    nodes = rotations(module.graph)
    folded = folded_weights(nodes, lambda name: _get(module, name), lambda node: str(node.target))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in nodes:
        for leftover in remove(module.graph, node):
            _discard(module, leftover)
    read = {str(node.target) for node in _weights(module) if node.users}
    kept = {name: tensor for name, tensor in parameters.items() if f".{REFLECTION}." not in name}
    for names in groups_of(kept):
        fresh = {name: nn.Parameter(folded[name]) for name in names if name in folded}
        if len(fresh) == 1:
            fresh |= {name: new for new in fresh.values() for name in names if name not in read}
        for name, new in fresh.items():
            _set(module, name, new)
            kept[name] = new
    note = note_of(module)
    if note is not None:
        _give_gradient(module, kept, set(note["trainable"]))
    module.meta = without_note(module)
    module.recompile()
    return module


def _weights(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that read a parameter."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [node for node in module.graph.find_nodes(op="get_attr") if node.target in parameters]


def _read(graph: fx.Graph, name: str, weights: dict[str, list[fx.Node]]) -> fx.Node:
    """The first node that reads a parameter, made where a tie or the removal of dead code left none."""
    if name not in weights:
        with graph.inserting_before(next(iter(graph.nodes))):
            weights[name] = [graph.get_attr(name)]
    return weights[name][0]


def _hoist(graph: fx.Graph) -> None:
    """Put every read of a tensor before its first use, which may be that of another read before."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        first = min(node.users, key=order.__getitem__, default=node)
        if order[first] < order[node]:
            first.prepend(node)


def _add(module: fx.GraphModule, site: GraphSite, fresh: Start, adapter_name: str, weight: fx.Node) -> Tensors:
    owner = module.get_submodule(site.path)
    if REFLECTION not in owner._modules:
        owner.add_module(REFLECTION, nn.Module())
    container = owner.get_submodule(REFLECTION)
    container.register_parameter(adapter_name, nn.Parameter(fresh.vectors, requires_grad=fresh.trainable))
    name = f"{site.path}.{REFLECTION}.{adapter_name}"
    with module.graph.inserting_after(weight):
        vectors = module.graph.get_attr(name)
        if fresh.anchor is None:
            return Tensors(vectors, None)
        container.register_buffer(adapter_name + ANCHOR, fresh.anchor)
        return Tensors(vectors, module.graph.get_attr(name + ANCHOR))


def _discard(module: fx.GraphModule, node: fx.Node) -> None:
    """Take a tensor of an adapter out, and its container with the last."""
    if node.users:
        return
    path, _, name = str(node.target).rpartition(".")
    module.graph.erase_node(node)
    container = module.get_submodule(path)
    delattr(container, name)
    if not [*container.parameters(), *container.buffers()]:
        del module.get_submodule(owner_of(path))._modules[REFLECTION]


def _give_gradient(module: fx.GraphModule, parameters: Mapping[str, Tensor], trainable: set[str]) -> None:
    for names in groups_of(parameters):
        tensor, wanted = parameters[names[0]], not trainable.isdisjoint(names)
        if tensor.requires_grad != wanted:
            alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
            for name in names:
                _set(module, name, alias)


def _get(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    module.get_submodule(path)._parameters[last] = parameter
