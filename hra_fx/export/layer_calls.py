"""Find the calls of layers among the operators of a captured graph, by the names of the weights.

The path of a layer is the name of its weight without the last part. If a tensor has several names, each use belongs to
the layer whose forward contains it (`nn_module_stack`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx

from hra_fx.compat import schema_of
from hra_fx.layers.target import LayerKind
from hra_fx.tracing.graph_module import module_path, normalize_path

_aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, LayerKind | None] = {
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv3d.padding: "conv3d",
    _aten.convolution.default: None,  # depends on the dimensions of the weight
}
_BY_DIMENSIONS: dict[int, LayerKind] = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
_SETTINGS = ("stride", "padding", "dilation", "groups")
_TRANSPOSES = {_aten.t.default, _aten.numpy_T.default, _aten.mT.default}
_METADATA = {
    _aten.sym_size.int,
    _aten.sym_size.default,
    _aten.sym_numel.default,
    _aten.sym_stride.int,
    _aten._assert_tensor_metadata.default,
}


class LayerCall(NamedTuple):
    """An operator that a layer can replace.

    Attributes:
        kind: the kind of the layer; `"Conv1D"` is the class of transformers, whose weight is `(d, out)`.
        x: the name of the argument that is the input of the layer.
        bias: the node of the bias, or `None`.
        settings: the other arguments of a convolution.
    """

    kind: LayerKind | Literal["Conv1D"]
    x: str
    bias: Any
    settings: dict[str, Any]


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight.

    Attributes:
        name: the name by which the graph reads the weight.
        weight: the node that reads the weight.
        user: the user of `weight`: the operator that computes with it, or a transpose before it.
        operator: the node that computes with the weight.
        call: the call of a layer that `operator` is; `None` for any other use.
    """

    name: str
    weight: fx.Node
    user: fx.Node
    operator: fx.Node
    call: LayerCall | None

    @property
    def path(self) -> str | None:
        """The module whose forward contains the operator, if the graph has this information."""
        return module_path(self.operator)


@dataclass(frozen=True, eq=False)
class GraphLayer:
    """A layer of a captured graph.

    Attributes:
        name: the qualified name of its weight.
        calls: the uses of its weight that are calls of the layer.
        uses: all uses of its weight.
        aliases: other paths of the same layer.
        others: uses of the same tensor by other layers, each with the name of the tensor in that layer.
    """

    path: str
    name: str
    calls: tuple[WeightUse, ...]
    uses: tuple[WeightUse, ...]
    aliases: tuple[str, ...]
    others: tuple[tuple[WeightUse, str], ...]


def find_layers(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> list[GraphLayer]:
    """Find the layers of a graph in the order of `tensors`, its parameters.

    A layer is not found if it is unknown to which layer a use of its weight belongs.
    """
    reads: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="get_attr"):
        reads[str(node.target)].append(node)
    found: list[GraphLayer] = []
    for names in group_tied(tensors):
        rank = tensors[names[0]].dim()
        found += _layers_of(names, tensors, [use for name in names for node in reads[name] for use in uses(node, rank)])
    order = {name: index for index, name in enumerate(tensors)}
    return sorted(found, key=lambda layer: order[layer.name])


def group_tied(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the names by tensor. After loading, tied tensors are different objects that share memory."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_identity(tensor), []).append(name)
    return list(groups.values())


def _identity(tensor: Tensor) -> object:
    if tensor.is_meta or type(tensor.data) is not Tensor or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def module_classes(graph: fx.Graph) -> dict[str, str]:
    """The classes of the modules in the `nn_module_stack`s of a graph: path -> qualified name of the class."""
    classes: dict[str, str] = {}
    for node in graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            text = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
            classes.setdefault(normalize_path(path), text)
    return classes


def _layers_of(names: list[str], tensors: Mapping[str, Tensor], uses: list[WeightUse]) -> Iterator[GraphLayer]:
    """The layers with one tensor, which has these names."""
    groups = _group_by_layer(names, tensors, uses)
    paths = [[name.rpartition(".")[0] for name in group] for group in groups]
    owners = [(use, _owner(use, paths)) for use in uses]
    for index, (name, *_) in enumerate(groups):
        own = tuple(use for use, owner in owners if owner == index)
        calls = tuple(use for use in own if use.call)
        others = [(use, owner) for use, owner in owners if owner != index]
        shared = {use.user for use in own} & {use.user for use, _ in others}
        is_clear = len(calls) == len(own) and not shared and all(owner is not None for _, owner in others)
        # Otherwise the weight may be that of an embedding, which an operator outside of it uses.
        is_called = any(use.path in paths[index] for use in calls)
        if name.endswith(".weight") and calls and (is_clear or (is_called and len(names) == 1)):
            named = tuple((use, groups[owner][0]) for use, owner in others if owner is not None)
            yield GraphLayer(paths[index][0], name, calls, own, tuple(paths[index][1:]), named)


def _group_by_layer(names: list[str], tensors: Mapping[str, Tensor], uses: list[WeightUse]) -> list[list[str]]:
    """Group the names of one tensor by layer: a layer that is called by several paths has several names.

    Names belong to the same layer if all tensors next to the weight are the same and the same operators use it.
    """
    layers: dict[object, list[str]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        targets = frozenset(use.operator.target for use in uses if use.path == path)
        siblings = frozenset(
            (key.removeprefix(f"{path}."), _identity(tensor))
            for key, tensor in tensors.items()
            if len(names) > 1 and key.startswith(f"{path}.")
        )
        layers.setdefault((targets, siblings) if targets else name, []).append(name)
    return list(layers.values())


def _owner(use: WeightUse, paths: list[list[str]]) -> int | None:
    """The index of the layer that a use belongs to: its forward contains it, or it is the only layer below it."""
    if len(paths) == 1:
        return 0
    path = use.path
    exact = [index for index, layer in enumerate(paths) if path in layer]
    below = [index for index, layer in enumerate(paths) if path and any(own.startswith(f"{path}.") for own in layer)]
    found = exact or below
    return found[0] if len(found) == 1 else None


def uses(weight: fx.Node, rank: int) -> Iterator[WeightUse]:
    """All uses of a weight except reads of its shape or dtype, in the order of the graph."""
    for user in weight.users:
        for operator in user.users if rank == 2 and _transposes(user) else (user,):
            if operator.target not in _METADATA:
                yield WeightUse(str(weight.target), weight, user, operator, _call(weight, user, operator, rank))


def _transposes(user: fx.Node) -> bool:
    """Whether an operator transposes a matrix."""
    axes: Any = user.args[1:]
    if user.target is _aten.permute.default:
        return bool(axes[0][0] % 2)
    if user.target is _aten.transpose.int:
        return bool(axes[0] % 2 != axes[1] % 2)
    return user.target in _TRANSPOSES


def _call(weight: fx.Node, user: fx.Node, operator: fx.Node, rank: int) -> LayerCall | None:
    """The call of a layer that an operator is; `None` if it uses another form of the weight."""
    target, given = operator.target, arguments_of(operator)
    if rank < 2:
        return None
    if target is _aten.linear.default and given["weight"] is weight:
        return LayerCall("linear", "input", given["bias"], {})
    if target in _CONVOLUTIONS and given["weight"] is weight and not given.get("transposed"):
        settings = {name: _plain(given[name]) for name in _SETTINGS}
        is_constant = all(isinstance(value, (int, str, tuple)) for value in settings.values())
        kind = _CONVOLUTIONS[target] or _BY_DIMENSIONS[rank]
        return LayerCall(kind, "input", given["bias"], settings) if is_constant else None
    # torch decomposes a linear layer into mm(x, t(w)) or addmm(bias, x, t(w)).
    if target is _aten.mm.default and user is not operator and given["mat2"] is user:
        return LayerCall("linear", "self", None, {})
    if target is _aten.addmm.default and given["mat2"] is user and given["alpha"] == given["beta"] == 1:
        return LayerCall("linear", "mat1", given["self"], {})
    if target is _aten.addmm.default and given["mat2"] is weight and given["alpha"] == given["beta"] == 1:
        return LayerCall("Conv1D", "mat1", given["self"], {})
    return None


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, including its defaults."""
    schema = schema_of(node.target)
    arguments = () if schema is None else schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    names = [argument.name for argument in arguments]
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _plain(setting: Any) -> Any:
    """A setting of a convolution in the form for its class. If it depends on a size, it is not an int, str or tuple."""
    if not isinstance(setting, (list, tuple)):
        return setting
    values = tuple(setting)
    if not all(isinstance(value, int) for value in values):
        return None
    return values[0] if len(values) == 1 else values
