"""The LoRA form of one adapted layer in memory, and the layers that LoRA cannot express."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.functional.rotate import as_rows, check_foldable
from hra_fx.layers.accelerate_hooks import loaded, offloading_hook
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.quantized.detect import quant_scheme_of
from hra_fx.layers.target import describe, weight_place
from hra_fx.lora.adapter import LoraLayer
from hra_fx.lora.change import change_of, noise_of
from hra_fx.lora.experts import experts_layer
from hra_fx.lora.unsupported import (
    IN_ENCODER_LAYER,
    OUTPUT_PROJECTION,
    OWN_FORWARD,
    unsupported,
    why_not_convolution,
)
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
    with loaded(weight_place(layer)[0]):
        return _lora_layer(path, layer, names, rank)


def _lora_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    if layer.hra_u.kind == "experts":
        return experts_layer(path, layer, names, rank)
    packing, box = quant_scheme_of(layer), layer.hra_u
    weight = base_weight(layer) if packing is None else packing.values(layer)
    for name in names:
        check_foldable(path, layer.hra_base, box[name], apply_GS=box.specs[name].apply_GS, adapter=name)
    rows = as_rows(weight.detach(), transposed=box.columns and packing is None)
    chain = box.joint_vectors(names, torch.float32 if weight.device.type == "mps" else torch.float64)
    chain = torch.zeros(box.width, 0) if chain is None else chain
    A, B, error = change_of(path, rows, chain, noise_of(box, names), rank)
    kernel = tuple(weight.shape[2:]) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
    return LoraLayer(path, box.kind, A, B, kernel, box.columns, error)


def check_expressible(path: str, layer: AdaptedLayer, parent: nn.Module) -> None:
    """Refuse a layer that PEFT's LoRA cannot express, or computes differently.

    Raises:
        UnsupportedLayerError: naming the layer and the reason.
    """
    if reason := _why_not(layer, parent):
        raise unsupported(path, describe(layer), reason)


def _why_not(layer: AdaptedLayer, parent: nn.Module) -> str | None:
    if layer.hra_u.kind == "experts":
        return None
    if isinstance(parent, nn.MultiheadAttention):
        return OUTPUT_PROJECTION
    if isinstance(parent, nn.TransformerEncoderLayer):
        return IN_ENCODER_LAYER
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (reason := why_not_convolution(layer)):
        return reason
    own_forward = not layer.hra_u.is_called and layer.hra_u.kind != "attention"
    if own_forward and (offloading_hook(layer) is not None or not _adds_change(layer)):  # a hook loads the old weight
        return OWN_FORWARD
    return None


@torch.no_grad()
def _adds_change(layer: AdaptedLayer) -> bool:
    """Whether another weight changes the output of a layer as PEFT's LoRA does: by a plain layer with the difference.

    A forward of its own may normalize the weight or pad the input first. One random input shows that, in float32.
    """
    probe = copy.deepcopy(layer).float().eval()
    weight, generator = probe.hra_base, torch.Generator().manual_seed(0)
    change = torch.randn(weight.shape, generator=generator).to(weight)
    width = (probe.hra_u.width,) if probe.hra_u.kind == "linear" else _image_size(weight)
    x = torch.randn(1, *width, generator=generator).to(weight)
    try:
        with probe.hra_u.inactive():
            before = probe(x)
            probe._parameters[probe.hra_u.weight_name] = nn.Parameter(weight + change)
            actual = probe(x) - before
        expected = _plain(probe, x, change)
    except Exception:  # a forward of the user's may raise anything
        return False
    return actual.shape == expected.shape and bool((actual - expected).norm() <= 1e-4 * expected.norm())


def _image_size(weight: Tensor) -> tuple[int, ...]:
    """The shape of an image that is larger than the kernel of a convolution."""
    return (weight.shape[1], *(2 * size + 1 for size in weight.shape[2:]))


def _plain(layer: AdaptedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """A plain layer without a bias, of the same geometry."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        result: Tensor = convolve(x, weight, None, layer.stride, layer.padding)
        return result
    return x @ (weight if layer.hra_u.columns else weight.mT)
