"""Why PEFT's LoRA cannot express some layers, or computes them differently."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hra_fx.errors import UnsupportedLayerError

OUTPUT_PROJECTION = "is the output projection of an attention, whose change PEFT's LoRA (0.21) adds twice"
IN_ENCODER_LAYER = "is in an nn.TransformerEncoderLayer, which reads its weight, so that PEFT's LoRA has no effect"
OWN_FORWARD = "has a forward of its own, to which PEFT's LoRA does not add what it adds to a plain layer"


def unsupported(path: str, description: str, reason: str) -> UnsupportedLayerError:
    """The error for a layer that is not expressible as LoRA.

    >>> unsupported("conv", "Conv2d 4->4 3x3", "is dilated")
    UnsupportedLayerError('conv: Conv2d 4->4 3x3 is dilated. Fold the model instead (hra_fx.fold), or leave the ...
    """
    return UnsupportedLayerError(
        f"{path}: {description} {reason}. Fold the model instead (hra_fx.fold), or leave the layer out with "
        "exclude_modules."
    )


def why_not_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str | None:
    """Why LoRA cannot express a convolution, as the end of a sentence; `None` if it can.

    >>> why_not_convolution(nn.Conv2d(4, 4, 3, groups=2))
    'has groups, for which the change of the weight is not a LoRA of this rank'
    """
    if layer.groups > 1:
        return "has groups, for which the change of the weight is not a LoRA of this rank"
    if any(step > 1 and size > 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "is dilated, which the convolutions of PEFT's LoRA are not"
    if layer.padding_mode != "zeros" and layer.padding not in ("valid", (0,) * len(layer.kernel_size)):
        return f"has padding_mode={layer.padding_mode!r}, and the convolutions of PEFT's LoRA pad with zeros"
    return None


def check_places(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a layer that several modules own: PEFT's LoRA would replace it in the first one only.

    Args:
        root: the whole model.
        layers: the adapted layers, by path.

    Raises:
        UnsupportedLayerError: naming the layer and its places.
    """
    paths = {layer: path for path, layer in layers.items()}
    owners: dict[str, list[str]] = {}
    for owner, module in root.named_modules():
        for name, child in module._modules.items():
            if child in paths:
                owners.setdefault(paths[child], []).append(f"{owner}.{name}".lstrip("."))
    for path, places in owners.items():
        if len(places) > 1:
            reason = f"is also {', '.join(places[1:])}, and PEFT's LoRA would change it in one place only"
            raise unsupported(path, "this layer", reason)
