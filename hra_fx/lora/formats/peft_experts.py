"""Experts in PEFT's LoRA: the names and shapes of `ParamWrapper`.

PEFT wraps a module once for each of its adapted parameters, one wrapper around the other; the last parameter has the
outermost. Source: `peft.tuners.lora.layer.ParamWrapper`, PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from hra_fx.lora.adapter import LoraLayer


def experts_tensors(layer: LoraLayer, layers: Iterable[LoraLayer], A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The two tensors of the experts in one parameter.

    Args:
        layer: the experts.
        layers: all layers of the adapter.
        A: `(experts, rank, d)`.
        B: `(experts, out, rank)`.

    Returns:
        `lora_A.weight: (experts * rank, d)`, in which the ranks of an expert are together, and
        `lora_B.weight: (out, rank * experts)`, in which the experts of a rank are.
    """
    owner = layer.path.rpartition(".")[0]
    outside = [one for one in layers if one.kind == "experts" and one.path.rpartition(".")[0] == owner]
    depth = sum(one.place > layer.place for one in outside)
    place = ".".join([owner, *["base_layer"] * depth]).lstrip(".")
    down, up = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return {f"{place}.lora_A.weight": down.contiguous(), f"{place}.lora_B.weight": up.contiguous()}
