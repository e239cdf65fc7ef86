"""The weights of a captured graph with their reflections in them: computed, and found finite, before any is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from hra_fx.errors import AdapterError, FoldError
from hra_fx.export.ops import rotated_weight
from hra_fx.functional import householder

#: The name of a parameter or buffer, by its node.
Naming = Callable[[fx.Node], str]


def folded_weights(
    rotations: Iterable[fx.Node], tensors: Callable[[str], Tensor], name_of: Naming
) -> dict[str, Tensor]:
    """The new weights of all rotations, in the dtype of the old ones and computed in float64 where the device has it.

    Args:
        rotations: the nodes of the rotations.
        tensors: gives the tensor of a name.
        name_of: gives the name of a node's tensor.

    Returns:
        name of the weight -> new weight.

    Raises:
        AdapterError: there is no rotation.
        FoldError: a weight would be noise or not finite, or holds no data.
    """
    made: dict[str, Tensor] = {}
    for node in rotations:
        weight, vectors, anchor = (argument if argument is None else name_of(argument) for argument in node.args[:3])  # type: ignore[arg-type]
        assert weight is not None and vectors is not None
        apply_GS, columns = (bool(argument) for argument in node.args[3:])
        made[weight] = _folded(
            weight,
            tensors(weight).detach(),
            tensors(vectors).detach(),
            None if anchor is None else tensors(anchor).detach(),
            apply_GS,
            columns,
        )
    if not made:
        raise AdapterError("the graph has no reflections. Transform it first: hra_fx.transform(program, config).")
    return made


def _folded(name: str, weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    if weight.is_meta or vectors.is_meta:
        raise FoldError(f"{name}: it or its vectors are on the meta device. Load them first.")
    if apply_GS and householder.dependence(vectors) < 8 * torch.finfo(vectors.dtype).eps:
        raise FoldError(
            f"{name}: its vectors are linearly dependent, and Gram-Schmidt of such vectors is noise. Train with "
            "apply_GS=False, or with init_weights=True, which starts them apart."
        )
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    anchor = None if anchor is None else anchor.to(dtype)
    exact = rotated_weight(weight.to(dtype), vectors.to(dtype), anchor, apply_GS, columns)
    folded = exact.to(weight.dtype)
    if not bool(torch.isfinite(folded).all()):
        raise FoldError(f"{name}: the folded weight is not finite. Look for NaN or inf in it and in its vectors.")
    return folded
