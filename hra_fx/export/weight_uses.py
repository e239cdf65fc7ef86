"""The uses of a weight in a graph of ATen operators.

Each use is followed through transposes, casts and splits to the operator that multiplies with the weight. If it ends at
any other operator, the kind of the use is unknown, and the weight must not be rotated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hra_fx.compat import pytree
from hra_fx.layers.target import LayerKind

_aten = torch.ops.aten

#: Matrix products: index of the argument with the matrix -> the dimension that is summed over.
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
        name: the name of the weight.
        weight: its node.
        first_user: the user of `weight` through which it is used. Replacing the argument of this node changes the use.
        consumer: the node at the end, which computes with the weight.
        kind: the kind of layer that the consumer is; `None` for anything but a linear layer or a convolution.
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
        """The module in whose forward the consumer is, if the graph has this information."""
        return module_path(self.consumer)


@dataclass(frozen=True)
class _View:
    """The weight after some operators: its form at `node`."""

    node: fx.Node
    first_user: fx.Node
    rank: int
    transposed: bool = False
    split_dim: int | None = None  # the dimension of the weight itself that it was split along


def find_weight_uses(weight: fx.Node, rank: int, name: str = "") -> list[WeightUse]:
    """All uses of a weight except reads of its shape or dtype, in the order of the graph.

    Args:
        weight: the placeholder or `get_attr` node of a parameter.
        rank: the number of its dimensions.
        name: its name, for the result.

    Returns:
        One `WeightUse` for each consumer and each way to it.
    """
    return [use for user in weight.users for use in _follow(_View(weight, user, rank), user, (name, weight))]


def module_path(node: fx.Node) -> str | None:
    """The path of the module whose forward contains a node, `""` for the root; `None` if the graph does not have it.

    Example:
        >>> program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> module_path(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0])
        '0'
    """
    stack = node.meta.get("nn_module_stack")
    return normalize_path(list(stack.values())[-1][0]) if stack else None


def normalize_path(path: str) -> str:
    """A path of `nn_module_stack` in the form of `named_modules`; TorchDynamo writes it as Python source.

    Example:
        >>> normalize_path("L['self'].blocks[0].proj"), normalize_path("L['self']._modules['blocks']._modules['0']")
        ('blocks.0.proj', 'blocks.0')
    """
    for before, after in (("L['self']", ""), ("._modules[", "["), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


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
    """The weight after an operator that only rearranges it; `None` for any other operator."""
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
    """Whether an operator that can transpose a matrix does so."""
    if user.target is _aten.permute.default:
        order: Any = user.args[1]
        return bool(order[0] % 2)
    if user.target is _aten.transpose.int:
        first, second = user.args[1:3]
        return first % 2 != second % 2  # type: ignore[operator]
    return True


def _classify(view: _View, user: fx.Node, index: int) -> tuple[LayerKind | None, bool]:
    """Kind and `transposed` of an operator that has the weight as its argument `index`."""
    if view.rank == 2 and index in _MATMULS.get(user.target, {}):
        summed = _MATMULS[user.target][index]
        summed = 1 - summed if view.transposed else summed
        return ("linear", summed == 0) if view.split_dim != summed else (None, False)
    if user.target in _CONVOLUTIONS and index == 1 and view.rank > 2:
        if user.target is _aten.convolution.default and user.args[_TRANSPOSED]:
            return None, False
        return _CONVOLUTIONS[user.target] or _BY_DIMENSIONS.get(view.rank), False
    return None, False
