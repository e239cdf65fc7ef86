"""Adapters as the LoRA file of diffusers: `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

Source of the format: diffusers 0.42, `LoraBaseMixin._save_lora_weights`: one file for all parts of a pipeline, with the
name of the part before each of PEFT's keys, and the fields of each part's `LoraConfig` in the metadata, named likewise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import write_weights
from hra_fx.checkpoint.keys import PREFIX
from hra_fx.errors import CheckpointError, UnsupportedLayerError
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.formats.peft import peft_form

LORA_NAME = "pytorch_lora_weights.safetensors"
_CONFIG_KEY = "lora_adapter_metadata"
# diffusers recognizes the keys of a text encoder by this spelling, or by PEFT's if q, k, v or out_proj are among them.
_TEXT_ENCODER_NAMES = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}


def write_diffusers(parts: Mapping[str, LoraAdapter], folder: Path, dtype: torch.dtype) -> None:
    """Write the file, atomically; the folder is created if needed.

    Args:
        parts: part of a pipeline, such as "unet" -> its adapter. Each has one rank, with zeros for smaller layers.
        folder: the folder.
        dtype: of the factors.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, adapter in parts.items():
        config, factors = peft_form(adapter, dtype)
        tensors |= {f"{part}.{_key(part, name)}": factor for name, factor in factors.items()}
        configs |= {f"{part}.{name}": value for name, value in config.items()}
    write_weights(folder / LORA_NAME, tensors, {_CONFIG_KEY: json.dumps(configs, indent=2, sort_keys=True)})


def _key(part: str, name: str) -> str:
    key = name.removeprefix(PREFIX)
    if part.startswith("text_encoder"):
        for ours, theirs in _TEXT_ENCODER_NAMES.items():
            key = key.replace(ours, theirs)
    return key


def check_diffusers(parts: Mapping[str, LoraAdapter]) -> None:
    """Check all but the values of the factors.

    Raises:
        CheckpointError: an adapter has trained modules or biases.
        UnsupportedLayerError: an `nn.MultiheadAttention` is adapted.
    """
    for part, adapter in parts.items():
        if adapter.copies:
            names = ", ".join(f"{part}.{key}" for key in list(adapter.copies)[:3])
            more = f" and {len(adapter.copies) - 3} more" if len(adapter.copies) > 3 else ""
            raise CheckpointError(
                f"{names}{more}: diffusers does not load trained modules or biases with a LoRA. Fold {part} instead "
                "(hra_fx.fold) and save the whole pipeline, or train with bias='none' and without modules_to_save."
            )
        for layer in adapter.layers:
            if layer.kind == "attention":
                raise UnsupportedLayerError(
                    f"{part}.{layer.path}: diffusers has no keys for an nn.MultiheadAttention. Fold {part} instead "
                    "(hra_fx.fold), or leave the layer out with exclude_modules."
                )
