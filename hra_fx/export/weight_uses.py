"""What becomes of a weight in a graph of aten operators: which nodes read it, and as what.

A read is followed through transposes, casts and cuts into blocks of outputs to the operator that multiplies with it.
What ends elsewhere is a read of no known meaning, after which the weight must not be rotated.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hra_fx.layers.target import SiteKind

_aten = torch.ops.aten

#: Multiplications by a matrix: argument that holds it -> the dimension of it that is summed over.
_PRODUCTS: dict[Any, dict[int, int]] = {
    _aten.linear.default: {1: 1},
    _aten.addmm.default: {1: 1, 2: 0},
    _aten.mm.default: {0: 1, 1: 0},
    _aten.matmul.default: {0: 1, 1: 0},
    _aten.bmm.default: {0: 1, 1: 0},  # of the last two
    _aten.mv.default: {0: 1},
    _aten.addmv.default: {1: 1},
}
_CONVOLUTIONS: dict[Any, SiteKind | None] = {
    _aten.conv1d.default: "conv1d",
    _aten.conv1d.padding: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv3d.padding: "conv3d",
    _aten.convolution.default: None,  # told by the weight's dimensions
}
_BY_DIMENSIONS: dict[int, SiteKind] = {3: "conv1d", 4: "conv2d", 5: "conv3d"}
_TRANSPOSED = 6  # argument of aten.convolution
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
_REPEATS = {_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default}
_CUTS = {
    _aten.split.Tensor,
    _aten.split.sizes,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
    _aten.slice.Tensor,
    _aten.narrow.default,
}
_QUESTIONS = {
    _aten.sym_size.int,
    _aten.sym_size.default,
    _aten.sym_numel.default,
    _aten.sym_stride.int,
    _aten._assert_tensor_metadata.default,
}


@dataclass(frozen=True)
class Read:
    """One way from a weight to what reads it.

    Attributes:
        name: the name of the weight.
        weight: its node.
        first: the user of `weight` on this way, whose argument is replaced where the read is to see another weight.
        reader: the end of the way.
        kind: what the reader does with the weight; `None` for anything but a linear layer or a convolution.
        columns: whether the reader sums over the first dimension of the weight, as GPT-2's layers do.
    """

    name: str
    weight: fx.Node
    first: fx.Node
    reader: fx.Node
    kind: SiteKind | None = None
    columns: bool = False

    @property
    def path(self) -> str | None:
        """The module in whose forward the reader stands, if the graph tells."""
        return module_path(self.reader)


@dataclass(frozen=True)
class _Seen:
    """A weight on its way: as it is at `node`."""

    node: fx.Node
    first: fx.Node
    rank: int
    transposed: bool = False
    batched: bool = False  # repeated along dimensions before the matrix
    cut: int | None = None  # dimension of the weight itself that it was cut along


def reads_of(weight: fx.Node, rank: int, name: str = "") -> list[Read]:
    """Every read of a weight but those that ask for its shape or dtype, in the order of the graph.

    Args:
        weight: the placeholder or `get_attr` of a parameter.
        rank: how many dimensions that has.
        name: what the reads are to call it.

    Returns:
        One `Read` for each reader and way.

    Example:
        >>> program = torch.export.export(torch.nn.Linear(3, 2), (torch.randn(1, 3),))
        >>> [(read.reader.name, read.kind, read.columns) for read in reads_of(next(iter(program.graph.nodes)), 2)]
        [('linear', 'linear', False)]
    """
    return [read for user in weight.users for read in _follow(_Seen(weight, user, rank), user, (name, weight))]


def module_path(node: fx.Node) -> str | None:
    """The path of the module in whose forward a node stands, `""` for the root's; `None` where the graph does not tell.

    Example:
        >>> program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> module_path(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[0])
        '0'
    """
    stack = node.meta.get("nn_module_stack")
    return plain_path(list(stack.values())[-1][0]) if stack else None


def plain_path(path: str) -> str:
    """A path of `nn_module_stack` as `named_modules` has it; TorchDynamo writes it as the source of an access.

    Example:
        >>> plain_path("L['self'].blocks[0].proj"), plain_path("L['self']._modules['blocks']._modules['0']")
        ('blocks.0.proj', 'blocks.0')
    """
    for before, after in (("L['self']", ""), ("._modules[", "["), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(before, after)
    return path.strip(".")


def _follow(seen: _Seen, user: fx.Node, origin: tuple[str, fx.Node]) -> Iterator[Read]:
    """The reads that begin where `user` takes the weight as it is at `seen.node`."""
    unknown = Read(*origin, seen.first, user)
    if user.target in _QUESTIONS:
        return
    places = [place for place, argument in enumerate(user.args) if argument is seen.node]
    if len(places) != 1 or _nested(user, seen.node) != 1:
        yield unknown
        return
    further = _step(seen, user) if places == [0] else None
    if further is not None:
        for following in user.users:
            yield from _follow(further, following, origin)
        return
    kind, columns = _meaning(seen, user, places[0])
    yield replace(unknown, kind=kind, columns=columns)


def _nested(user: fx.Node, node: fx.Node) -> int:
    """How often a node stands among the arguments of another, in lists too."""
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((user.args, user.kwargs), look)
    return count


def _step(seen: _Seen, user: fx.Node) -> _Seen | None:
    """The weight behind an operator that only arranges it anew; `None` where the operator does more."""
    target = user.target
    if target in _CASTS or (target is operator.getitem and not seen.batched):
        return replace(seen, node=user)
    if target in _REPEATS and seen.rank == 2:
        return _repeated(seen, user)
    if seen.batched:
        return None
    if target in _TRANSPOSES and seen.rank == 2:
        return replace(seen, node=user, transposed=seen.transposed ^ _swaps(user))
    if target in _CUTS and seen.rank == 2:
        place = 1 if target in (_aten.slice.Tensor, _aten.narrow.default) else 2
        dimension = int(user.args[place] if len(user.args) > place else user.kwargs.get("dim", 0)) % 2  # type: ignore[arg-type]
        dimension = 1 - dimension if seen.transposed else dimension
        return replace(seen, node=user, cut=dimension) if seen.cut in (None, dimension) else None
    return None


def _repeated(seen: _Seen, user: fx.Node) -> _Seen | None:
    """A matrix behind an operator that repeats it for a batched product, as decompositions do."""
    before, after = (node.meta.get("val") for node in (seen.node, user))
    if before is None or after is None or after.dim() < 3 or before.shape[-2:] != after.shape[-2:]:
        return None
    if user.target is not _aten.expand.default and not seen.batched:
        return None
    return replace(seen, node=user, batched=True)


def _swaps(user: fx.Node) -> bool:
    """Whether an operator that may transpose a matrix does."""
    if user.target is _aten.permute.default:
        order: Any = user.args[1]
        return bool(order[0] % 2)
    if user.target is _aten.transpose.int:
        first, second = user.args[1:3]
        return first % 2 != second % 2  # type: ignore[operator]
    return True


def _meaning(seen: _Seen, user: fx.Node, place: int) -> tuple[SiteKind | None, bool]:
    """What an operator does with the weight that it has as its argument number `place`."""
    if seen.batched != (user.target is _aten.bmm.default):
        return None, False
    if seen.rank == 2 and place in _PRODUCTS.get(user.target, {}):
        summed = _PRODUCTS[user.target][place]
        summed = 1 - summed if seen.transposed else summed
        return ("linear", summed == 0) if seen.cut != summed else (None, False)
    if user.target in _CONVOLUTIONS and place == 1 and seen.rank > 2:
        if user.target is _aten.convolution.default and user.args[_TRANSPOSED]:
            return None, False
        return _CONVOLUTIONS[user.target] or _BY_DIMENSIONS.get(seen.rank), False
    return None, False
