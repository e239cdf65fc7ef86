"""The LoRA form of one adapted layer in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.errors import AdapterError
from hra_fx.functional import low_rank
from hra_fx.functional.rotate import as_rows, check_foldable
from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.experts_weight import is_transposed
from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.layers.sharding import gathered
from hra_fx.layers.target import weight_place
from hra_fx.lora.adapter import LoraLayer
from hra_fx.model.rotate import base_weight


def lora_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    """The LoRA form of a layer under some of its adapters.

    Args:
        path: the layer's path.
        layer: the layer.
        names: its adapters, in the order of the product.
        rank: the largest rank, or `None`.

    Raises:
        AdapterError: the weight or the vectors are not finite.
        FoldError: the weight or the vectors are on the meta device, or the vectors of a Gram-Schmidt adapter are
            linearly dependent.
    """
    owner = weight_place(layer)[0]
    with loaded(owner), gathered(dict.fromkeys((owner, layer, *layer.hra_u.modules()))):
        return _lora_layer(path, layer, names, rank)


def _lora_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    box = layer.hra_u
    for name in names:
        check_foldable(path, layer.hra_base, box[name], apply_GS=box.specs[name].apply_GS, adapter=name)
    if box.kind == "experts":
        return _experts_layer(path, layer, names, rank)
    packing = quant_scheme_of(layer)
    weight = base_weight(layer) if packing is None else packing.values(layer)
    rows = as_rows(weight.detach(), transposed=box.columns and packing is None)
    chain = box.joint_vectors(names, torch.float32 if weight.device.type == "mps" else torch.float64)
    chain = torch.zeros(box.width, 0) if chain is None else chain
    A, B, error = _change_of(path, rows, chain, _noise_of(box, names), rank)
    kernel = tuple(weight.shape[2:]) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
    return LoraLayer(path, box.kind, A, B, kernel, box.columns, error)


def _experts_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    box: Any = layer.hra_u
    site: Any = layer
    rows, chain = box.rows(base_weight(layer)), box.joint_vectors(names, torch.float64)
    chain = torch.zeros(box.experts, box.width, 0) if chain is None else chain
    noise = _noise_of(box, names)
    changes = [_change_of(path, *both, noise, rank) for both in zip(rows, chain, strict=True)]
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


def _change_of(path: str, rows: Tensor, chain: Tensor, noise: float, rank: int | None) -> low_rank.WeightChange:
    """`W Q - W = B A` of a weight, for rows `W: (out, d)` and a chain `U: (d, k)`."""
    _check_finite(path, chain)
    V, K = low_rank.core(chain, noise)
    projected = low_rank.project(rows, V)
    _check_finite(path, projected)
    return low_rank.weight_change(projected, V, K, rank)


def _noise_of(box: HouseholderAdapters, names: Sequence[str]) -> float:
    """How far the `Q` of fresh adapters may be from the identity."""
    anchored = [box[name] for name in names if box.specs[name].apply_GS and box.anchor(name) is not None]
    return sum(low_rank.anchor_noise(vectors.shape[-1], vectors.dtype) for vectors in anchored)


def _check_finite(path: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"{path}: its weight or its vectors have NaN or infinite values. Load or train it again.")
