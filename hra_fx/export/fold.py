"""The folded weights of a captured graph. All are computed and checked before any is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from hra_fx.errors import AdapterError
from hra_fx.functional.rotate import check_finite, check_foldable, rotate_weight
from hra_fx.layers.adapters import plain_chain


def compute_folded_weights(
    rotate_nodes: Iterable[fx.Node], tensors: Callable[[str], Tensor], name_of: Callable[[fx.Node], str]
) -> dict[str, Tensor]:
    """The folded weights, computed in float64 (float32 on MPS) and converted to the dtype of the base weights.

    Args:
        rotate_nodes: the nodes of `hra_fx::rotate`.
        tensors: returns the tensor of a name.
        name_of: returns the name of the parameter or buffer that a node reads.

    Returns:
        Name of the weight -> folded weight.

    Raises:
        AdapterError: there are no rotate nodes.
        FoldError: a weight or its vectors are on the meta device, or the folded weight would not be finite, or
            Gram-Schmidt gets linearly dependent vectors.
    """
    folded: dict[str, Tensor] = {}
    for node in rotate_nodes:
        weight, vectors, anchor = (argument if argument is None else name_of(argument) for argument in node.args[:3])  # type: ignore[arg-type]
        assert weight is not None and vectors is not None
        apply_GS, transposed = (bool(argument) for argument in node.args[3:])
        folded[weight] = _fold(
            weight,
            tensors(weight).detach(),
            tensors(vectors).detach(),
            None if anchor is None else tensors(anchor).detach(),
            apply_GS=apply_GS,
            transposed=transposed,
        )
    if not folded:
        raise AdapterError("the graph has no reflections. Transform it first: hra_fx.transform(program, config).")
    return folded


def _fold(
    name: str, weight: Tensor, vectors: Tensor, anchor: Tensor | None, *, apply_GS: bool, transposed: bool
) -> Tensor:
    check_foldable(name, weight, vectors, apply_GS=apply_GS)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    chain = plain_chain(vectors.to(dtype), anchor, apply_GS=apply_GS)
    folded = rotate_weight(weight.to(dtype), chain, transposed=transposed).to(weight.dtype)
    check_finite(name, folded)
    return folded
