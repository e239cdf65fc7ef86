"""Find the layers of a captured graph by the names of their weights and the operators that use them.

The path of a layer is the name of its weight without the last part. If a tensor has several names, each use belongs to
the layer whose forward contains it (`nn_module_stack`).

Each use of a weight is followed through transposes, casts and splits to the operator that multiplies with the weight.
If it ends at any other operator, the kind of use is unknown, and the weight must not be rotated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hra_fx.compat import pytree
from hra_fx.layers.target import LayerKind
from hra_fx.tracing.graph_module import module_path, normalize_path

#: Name of a parameter that can be rotated -> the kind of layer, if the name determines it.
WEIGHTS: dict[str, LayerKind | None] = {"weight": None, "in_proj_weight": "attention"}


_aten = torch.ops.aten

#: Matrix products: index of the matrix argument -> the dimension that is summed over.
_MATMULS: dict[Any, dict[int, int]] = {
    _aten.linear.default: {1: 1},
    _aten.addmm.default: {1: 1, 2: 0},
    _aten.mm.default: {0: 1, 1: 0},
    _aten.matmul.default: {0: 1, 1: 0},
    _aten.mv.default: {0: 1},
    _aten.addmv.default: {1: 1},
}
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
_TRANSPOSED = 6  # index of the argument of aten.convolution
_TRANSPOSES = {_aten.t.default, _aten.numpy_T.default, _aten.mT.default, _aten.permute.default, _aten.transpose.int}
_CASTS = {
    _aten._to_copy.default,
    _aten.to.dtype,
    _aten.to.device,
    _aten.to.dtype_layout,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.alias.default,
}
_SPLITS = {
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
    _aten.slice.Tensor,
    _aten.narrow.default,
}
_METADATA = {
    _aten.sym_size.int,
    _aten.sym_size.default,
    _aten.sym_numel.default,
    _aten.sym_stride.int,
    _aten._assert_tensor_metadata.default,
}


@dataclass(frozen=True)
class WeightUse:
    """One use of a weight.

    Attributes:
        first_user: the first user of `weight` on the way. Replacing the argument of this node changes the use.
        consumer: the last node, which computes with the weight.
        kind: the kind of layer of the consumer; `None` if it is not a linear layer or a convolution.
        transposed: whether the consumer sums over the first dimension of the weight, as transformers' `Conv1D` does.
    """

    name: str
    weight: fx.Node
    first_user: fx.Node
    consumer: fx.Node
    kind: LayerKind | None = None
    transposed: bool = False

    @property
    def path(self) -> str | None:
        """The module whose forward contains the consumer, if the graph has this information."""
        return module_path(self.consumer)


@dataclass(frozen=True)
class GraphLayer:
    """A layer of a captured graph.

    Attributes:
        name: the qualified name of its weight.
        transposed: whether its weight is stored as `(d, out)`.
        refusal: why its weight cannot be rotated, and what to do; `None` if it can.
        is_module: whether an operator in the layer's own forward uses the weight, so that the layer is a linear layer
            or a convolution. This is False for an embedding whose weight a linear operator uses somewhere else.
        aliases: other paths of the same layer.
        others: uses of the same tensor by other layers, each with the name of the tensor in that layer.
    """

    path: str
    name: str
    kind: LayerKind
    transposed: bool
    uses: tuple[WeightUse, ...]
    refusal: str | None
    is_module: bool
    aliases: tuple[str, ...]
    others: tuple[tuple[WeightUse, str], ...]

    @property
    def source(self) -> str:
        """The name that the graph uses to read the weight; its own name if other layers use the same tensor."""
        return self.name if self.others else self.uses[0].name

    @property
    def is_candidate(self) -> bool:
        """Whether it counts as a layer: `is_module` is True, or its weight can be rotated for all uses."""
        return self.is_module or self.refusal is None


def find_layers(weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor]) -> dict[str, GraphLayer]:
    """Find all layers with a weight that a linear operator or a convolution uses, including unsupported layers."""
    found: dict[str, GraphLayer] = {}
    for names in group_tied(tensors):
        rank = tensors[names[0]].dim()
        uses = [use for name in names for node in weights.get(name, ()) for use in find_weight_uses(node, rank, name)]
        if any(use.kind for use in uses):
            found |= {layer.path: layer for layer in _graph_layers(_group_by_layer(names, tensors, uses), uses)}
    order = {name: index for index, name in enumerate(tensors)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].name]))


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


def _group_by_layer(names: list[str], tensors: Mapping[str, Tensor], uses: list[WeightUse]) -> list[list[str]]:
    """Group the names of one tensor by layer: a layer that is called by several paths has several names.

    Names belong to the same layer if all tensors next to the weight are the same and the same operators use it.
    """
    layers: dict[object, list[str]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        targets = frozenset(use.consumer.target for use in uses if use.path == path)
        siblings = frozenset(
            (key.removeprefix(f"{path}."), _identity(tensor))
            for key, tensor in tensors.items()
            if len(names) > 1 and key.startswith(f"{path}.")
        )
        layers.setdefault((targets, siblings) if targets else name, []).append(name)
    return list(layers.values())


def _graph_layers(layers: list[list[str]], uses: list[WeightUse]) -> Iterable[GraphLayer]:
    paths = [[name.rpartition(".")[0] for name in names] for names in layers]
    owners = [(use, _owner(use, paths)) for use in uses]
    for index, (name, *_) in enumerate(layers):
        own = [use for use, owner in owners if owner == index]
        linear = [use for use in own if use.kind]
        last = name.rpartition(".")[2]
        if last not in WEIGHTS or not linear or not name.rpartition(".")[0]:
            continue
        kind = WEIGHTS[last] or linear[0].kind
        assert kind is not None  # `linear` has only uses with a kind
        yield GraphLayer(
            path=name.rpartition(".")[0],
            name=name,
            kind=kind,
            transposed=linear[0].transposed,
            uses=tuple(own),
            refusal=_refusal(own, [use for use, owner in owners if owner != index], owners),
            is_module=any(use.path in paths[index] for use in linear),
            aliases=tuple(paths[index][1:]),
            others=tuple((use, layers[owner][0]) for use, owner in owners if owner not in (index, None)),
        )


def _owner(use: WeightUse, paths: list[list[str]]) -> int | None:
    """The index of the layer that a use belongs to: its forward contains it, or it is the only layer below it."""
    if len(paths) == 1:
        return 0
    path = use.path
    exact = [index for index, layer in enumerate(paths) if path in layer]
    below = [index for index, layer in enumerate(paths) if path and any(own.startswith(f"{path}.") for own in layer)]
    found = exact or below
    return found[0] if len(found) == 1 else None


def _refusal(own: list[WeightUse], others: list[WeightUse], owners: list[tuple[WeightUse, int | None]]) -> str | None:
    unsupported = next((use for use in own if use.kind is None), None)
    if unsupported is not None:
        return (
            f"its weight is also used by {_describe(unsupported)}, which would get the rotated weight. Exclude the "
            "layer with exclude_modules, or untie the two weights before capturing the model"
        )
    shared = {use.first_user for use in own} & {use.first_user for use in others}
    ambiguous = next((use for use, owner in owners if owner is None or use.first_user in shared), None)
    if ambiguous is not None:
        return (
            f"its weight has several names, and it is unknown which layer its use by {_describe(ambiguous)} belongs "
            "to. Untie the weights before capturing the model, or exclude the layer with exclude_modules"
        )
    if len({use.transposed for use in own}) > 1:
        plain, transposed = (next(use for use in own if use.transposed is side) for side in (False, True))
        return (
            f"its weight is used as `(out, d)` by {_describe(plain)}, and transposed by {_describe(transposed)}, so "
            "its input dimension is ambiguous. Exclude the layer with exclude_modules"
        )
    return None


def _describe(use: WeightUse) -> str:
    where = "" if use.path is None else f" in {use.path or 'the root module'}"
    return f"{use.consumer.target} (node {use.consumer.name!r}{where})"


# --- uses of a weight -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """The form of a weight at `node`, after some operators."""

    node: fx.Node
    first_user: fx.Node
    rank: int
    transposed: bool = False
    split_dim: int | None = None  # the dimension of the weight itself that it was split along


def find_weight_uses(weight: fx.Node, rank: int, name: str = "") -> list[WeightUse]:
    """Find all uses of a weight except reads of its shape or dtype, in the order of the graph."""
    return [use for user in weight.users for use in _follow(_View(weight, user, rank), user, (name, weight))]


def _follow(view: _View, user: fx.Node, origin: tuple[str, fx.Node]) -> Iterator[WeightUse]:
    """The uses that start with `user`, a user of `view.node`."""
    unknown = WeightUse(*origin, view.first_user, user)
    if user.target in _METADATA:
        return
    indices = [index for index, argument in enumerate(user.args) if argument is view.node]
    reads = sum(leaf is view.node for leaf in pytree.tree_leaves((user.args, user.kwargs)))
    if len(indices) != 1 or reads != 1:
        yield unknown
        return
    following = _step(view, user) if indices == [0] else None
    if following is not None:
        for next_user in user.users:
            yield from _follow(following, next_user, origin)
        return
    kind, transposed = _classify(view, user, indices[0])
    yield replace(unknown, kind=kind, transposed=transposed)


def _step(view: _View, user: fx.Node) -> _View | None:
    """The form of the weight after an operator that only rearranges it; `None` for any other operator."""
    target = user.target
    if target in _CASTS or target is operator.getitem:
        return replace(view, node=user)
    if target in _TRANSPOSES and view.rank == 2:
        return replace(view, node=user, transposed=view.transposed ^ _swaps(user))
    if target in _SPLITS and view.rank == 2:
        index = 1 if target in (_aten.slice.Tensor, _aten.narrow.default) else 2
        dim = int(user.args[index] if len(user.args) > index else user.kwargs.get("dim", 0)) % 2  # type: ignore[arg-type]
        dim = 1 - dim if view.transposed else dim
        return replace(view, node=user, split_dim=dim) if view.split_dim in (None, dim) else None
    return None


def _swaps(user: fx.Node) -> bool:
    """Whether an operator that can transpose a matrix really transposes it."""
    if user.target is _aten.permute.default:
        order: Any = user.args[1]
        return bool(order[0] % 2)
    if user.target is _aten.transpose.int:
        first, second = user.args[1:3]
        return first % 2 != second % 2  # type: ignore[operator]
    return True


def _classify(view: _View, user: fx.Node, index: int) -> tuple[LayerKind | None, bool]:
    """The kind of an operator with the weight as its argument `index`, and `transposed`."""
    if view.rank == 2 and index in _MATMULS.get(user.target, {}):
        summed = _MATMULS[user.target][index]
        summed = 1 - summed if view.transposed else summed
        return ("linear", summed == 0) if view.split_dim != summed else (None, False)
    if user.target in _CONVOLUTIONS and index == 1 and view.rank > 2:
        if user.target is _aten.convolution.default and user.args[_TRANSPOSED]:
            return None, False
        return _CONVOLUTIONS[user.target] or _BY_DIMENSIONS.get(view.rank), False
    return None, False
