"""One adapted layer as LoRA: the change of its weight, `W Q - W = B A`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.errors import FoldError
from hra_fx.functional import low_rank
from hra_fx.functional.rotate import as_rows, check_foldable, widest_dtype
from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts_weight import is_transposed, parameter_of
from hra_fx.layers.quantized.libraries import quant_scheme_of
from hra_fx.layers.sharding import gathered
from hra_fx.layers.target import weight_place
from hra_fx.lora.adapter import LoraLayer
from hra_fx.model.merge import base_weight


def lora_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    """Convert a layer with some of its adapters, in the order of the product, to its LoRA form."""
    adapters: Any = layer.hra_u
    owner = weight_place(layer)[0]
    with loaded(owner), gathered(dict.fromkeys((owner, layer, *adapters.modules()))):
        for name in names:
            check_foldable(path, layer.hra_base, adapters[name], apply_GS=adapters.specs[name].apply_GS, adapter=name)
        rows, kernel = _rows(layer)
        chain = adapters.joint_vectors(names, widest_dtype(rows.device))
        chain = torch.zeros(*rows.shape[:-2], rows.shape[-1], 0) if chain is None else chain
        chains = chain if chain.dim() == 3 else chain[None]
        try:
            changes = [_change_of(W, U, rank) for W, U in zip(rows, chains, strict=True)]
        except torch.linalg.LinAlgError as failure:  # type: ignore[attr-defined]
            raise FoldError(f"{path}: its weight or the vectors of its adapters are not finite.") from failure
    if adapters.kind == "experts":
        return _of_experts(path, layer, changes)
    A, B, error = changes[0]
    return LoraLayer(path, adapters.kind, A, B, kernel, adapters.fan_in_fan_out, error)


def _change_of(W: Tensor, U: Tensor, rank: int | None) -> low_rank.LowRankDelta:
    """The change of a weight `W: (out, d)` by a chain."""
    V, K = low_rank.core(U)
    # A weight that does not change is not read.
    projected = low_rank.project(W, V) if len(K) else torch.zeros(len(W), 0, dtype=torch.float64)
    return low_rank.low_rank_delta(projected, V, K, rank)


def _rows(layer: AdaptedLayer) -> tuple[Tensor, tuple[int, ...]]:
    """The weight of each expert, or of the layer, as `(experts or 1, out, d)`; and the kernel size of a convolution."""
    adapters: Any = layer.hra_u
    if adapters.kind == "experts":
        return adapters.rows(base_weight(layer).detach()), ()
    scheme = quant_scheme_of(layer)
    weight = (base_weight(layer) if scheme is None else scheme.values(layer)).detach()
    kernel = tuple(weight.shape[2:]) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ()
    return as_rows(weight, transposed=adapters.fan_in_fan_out and scheme is None)[None], kernel


def _of_experts(path: str, layer: Any, changes: Sequence[low_rank.LowRankDelta]) -> LoraLayer:
    """The LoRA form of the experts in one parameter, with the largest rank of an expert."""
    longest = max(len(A) for A, _, _ in changes)
    A = torch.stack([F.pad(A, (0, 0, 0, longest - len(A))) for A, _, _ in changes])
    B = torch.stack([F.pad(B, (0, longest - B.shape[1])) for _, B, _ in changes])
    # PEFT assumes `(experts, out, in)` for parameters of classes without `is_transposed`. If they are stored as
    # `(experts, in, out)`, the two factors are swapped.
    if is_transposed(layer.owner) and not getattr(layer.owner, "is_transposed", False):
        A, B = B.mT.contiguous(), A.mT.contiguous()
    place = list(layer.owner._parameters).index(parameter_of(path).rpartition(".")[2])
    return LoraLayer(path, "experts", A, B, error=max(error for *_, error in changes), place=place)
