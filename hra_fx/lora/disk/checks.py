"""Refuse layers on disk that LoRA cannot express.

The shape of a convolution's weight does not show its groups, its dilation or its padding; the model does. It also shows
which weights other modules read, and how PEFT renames layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from hra_fx.checkpoint.disk.architecture import CONFIG, IN_MEMORY, Architecture
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import LayerKind, describe
from hra_fx.lora.disk.base_files import BaseFiles
from hra_fx.lora.peft_names import check_names, has_experts, renamings_of
from hra_fx.lora.unsupported import OUTPUT_PROJECTION, OWN_FORWARD, unsupported, why_not_convolution
from hra_fx.lora.weight_reads import check_reads

_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def check_layers(opened: BaseFiles, layers: Mapping[str, LayerKind]) -> None:
    """Check that LoRA can express all layers, given by path.

    Raises:
        UnsupportedLayerError: it cannot.
        CheckpointError: there is a convolution, and the model of `config.json` cannot be built.
    """
    for path in layers:
        parent, _, name = path.rpartition(".")
        if name == "out_proj" and opened.names.find(f"{parent}.in_proj_weight", f"{parent}.q_proj_weight"):
            raise unsupported(path, "this layer", OUTPUT_PROJECTION)
    for path in (path for path, kind in layers.items() if kind.startswith("conv")):
        layer: Any = opened.architecture.find(path)
        if layer is None:
            raise CheckpointError(
                f"{opened.architecture.folder}: there is no {CONFIG} of an installed transformers, diffusers or timm "
                f"model with {path}, so it is unknown whether this convolution has groups or a dilation, which LoRA "
                f"cannot express. {IN_MEMORY}"
            )
        reason = why_not_convolution(layer) or (None if type(layer).forward in _PLAIN else OWN_FORWARD)
        if reason:
            raise unsupported(path, describe(layer), reason)
    _check_model(opened.architecture, layers, has_experts(opened.modules()))


def _check_model(architecture: Architecture, paths: Collection[str], renamed: bool) -> None:
    """Refuse layers that PEFT's LoRA does not find, or has no effect on; `renamed`: whether PEFT may rename them."""
    check_names(paths, architecture.entries.get("model_type"), renamings_of(architecture.model) if renamed else ())
    if architecture.model is not None:
        places = [place for path in paths if (place := architecture.place(path)) is not None]
        check_reads(architecture.model, {place: architecture.model.get_submodule(place) for place in places})
