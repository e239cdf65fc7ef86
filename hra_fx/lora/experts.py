"""The LoRA form of the experts in one 3-D parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.functional.rotate import check_foldable
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts_adapters import ExpertsAdapters
from hra_fx.layers.experts_weight import is_transposed
from hra_fx.lora.adapter import LoraLayer
from hra_fx.lora.change import change_of, noise_of
from hra_fx.model.rotate import base_weight


def experts_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    """The LoRA form of experts; arguments and errors as `lora_layer`."""
    box: Any = layer.hra_u
    site: Any = layer
    for name in names:
        check_foldable(path, layer.hra_base, box[name], apply_GS=box.specs[name].apply_GS, adapter=name)
    rows, chain = box.rows(base_weight(layer)), _chain(box, names)
    changes = [change_of(path, *both, noise_of(box, names), rank) for both in zip(rows, chain, strict=True)]
    return stacked_layer(path, site.owner, site.parameter, changes)


def stacked_layer(
    path: str, owner: nn.Module, parameter: str, changes: Sequence[tuple[Tensor, Tensor, float]]
) -> LoraLayer:
    """The LoRA form of the experts in a parameter of a module, `A: (experts, k, d)` and `B: (experts, out, k)`.

    PEFT takes the parameters of classes without `is_transposed` for `(experts, out, in)`. If they are stored the other
    way, the two factors change places.

    Args:
        path: the path of the layer that stands for the parameter.
        owner: the module.
        parameter: the name in it.
        changes: `A: (k, d)`, `B: (out, k)` and the error of each expert.
    """
    longest = max(len(A) for A, _, _ in changes)
    A = torch.stack([F.pad(A, (0, 0, 0, longest - len(A))) for A, _, _ in changes])
    B = torch.stack([F.pad(B, (0, longest - B.shape[1])) for _, B, _ in changes])
    if is_transposed(owner) and not getattr(owner, "is_transposed", False):
        A, B = B.mT.contiguous(), A.mT.contiguous()
    place = list(owner._parameters).index(parameter)
    return LoraLayer(path, "experts", A, B, error=max((error for *_, error in changes), default=math.nan), place=place)


def _chain(box: ExpertsAdapters, names: Sequence[str]) -> Tensor:
    chain = box.joint_vectors(names, torch.float64)
    return torch.zeros(box.experts, box.width, 0) if chain is None else chain
