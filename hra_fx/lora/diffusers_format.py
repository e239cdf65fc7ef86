"""Adapters in diffusers' LoRA format: `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

Source of the format: diffusers 0.42, `LoraBaseMixin._save_lora_weights`. There is one file for all parts of a pipeline.
The name of the part is a prefix of PEFT's keys, and of the fields of the part's `LoraConfig` in the metadata.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.checkpoint.folder import PREFIX, write_weights
from hra_fx.compat import loaded_class
from hra_fx.errors import AdapterError, CheckpointError
from hra_fx.lora.adapter import LoraAdapter, peft_form
from hra_fx.lora.from_model import lora_adapter
from hra_fx.model.state import collect_parts, root_of, unwrap
from hra_fx.selection.suggestions import some_of

LORA_NAME = "pytorch_lora_weights.safetensors"
# diffusers recognizes the keys of a text encoder by these names, or by PEFT's names if q, k, v or out_proj are adapted.
_TEXT_ENCODER_NAMES = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}

#: Parts that diffusers lists as loadable, but loads only with another argument (`load_into_transformer_2=True`).
_ON_REQUEST = ("transformer_2",)


def write_diffusers(parts: Mapping[str, LoraAdapter], path: Path, dtype: torch.dtype) -> None:
    """Write the file atomically, into a folder or with the name `path`. The folder is created if needed.

    Each part of a pipeline has one rank; smaller layers are padded with zeros. A single file of a UNet has the names of
    kohya's scripts, which ComfyUI and others read.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    is_kohya = path.suffix.lower() == ".safetensors" and "unet" in parts
    for part, adapter in parts.items():
        if adapter.copies:
            names = some_of([f"{part}.{key}" for key in adapter.copies], 3)
            raise CheckpointError(
                f"{names}: diffusers does not load trained modules or biases with a LoRA. Fold {part} instead "
                "(hra_fx.fold) and save the whole pipeline, or train with bias='none' and without modules_to_save."
            )
        config, factors = peft_form(adapter, dtype)
        renamed = _TEXT_ENCODER_NAMES if part.startswith("text_encoder") and not is_kohya else {}
        for name, factor in factors.items():
            key = name.removeprefix(PREFIX)
            for ours, theirs in renamed.items():
                key = key.replace(ours, theirs)
            if is_kohya and key.startswith("encoder."):  # of CLIP in newer releases of transformers
                key = f"text_model.{key}"
            tensors[f"{part}.{key}"] = factor
        configs |= {f"{part}.{name}": value for name, value in config.items()}
    if is_kohya:
        convert: Any = importlib.import_module("diffusers.utils.state_dict_utils").convert_state_dict_to_kohya
        write_weights(path, convert(tensors))
        return
    file = path if path.suffix.lower() == ".safetensors" else path / LORA_NAME
    write_weights(file, tensors, lora_adapter_metadata=json.dumps(configs, indent=2, sort_keys=True))


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The adapted parts of a pipeline, such as "unet". For a UNet or transformer of diffusers, the model itself.

    Empty for other modules: a single text encoder, for example, is a transformers model, saved in PEFT's format.
    """
    if not isinstance(model, nn.Module):
        return _adapted_components(model)
    inner = unwrap(model)
    if not isinstance(inner, loaded_class("diffusers.loaders.peft", "PeftAdapterMixin")):
        return {}
    # "transformer" is also where `load_lora_adapter` of a model looks by default.
    return {"unet" if type(inner).__name__.startswith("UNet") else "transformer": inner}


def _adapted_components(pipeline: Any) -> dict[str, nn.Module]:
    class_name = type(pipeline).__name__
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise AdapterError(f"`model_or_pipeline` must be a torch.nn.Module or a diffusers pipeline, got {class_name}.")
    modules = {name: unwrap(part) for name, part in components.items() if isinstance(part, nn.Module)}
    adapted = {name: part for name, part in modules.items() if collect_parts(part).layers}
    if not adapted:
        names = ", ".join(modules) or "no modules"
        raise AdapterError(f"{class_name}: no part of it has adapters ({names}). Call hra_fx.transform on one first.")
    loadable = [name for name in getattr(pipeline, "_lora_loadable_modules", ()) if name not in _ON_REQUEST]
    for name in adapted:
        if name not in loadable:
            where = f"only into {', '.join(loadable)}" if loadable else "into no part of this pipeline"
            raise AdapterError(
                f"{name}: load_lora_weights of diffusers loads {where} without further arguments. Fold {name} "
                f"(hra_fx.fold), or save each part separately (hra_fx.save_as_lora(pipe.{name}, ...))."
            )
    return adapted


def adapters_of(
    parts: Mapping[str, nn.Module], adapter_names: str | Iterable[str] | None, rank: int | None
) -> dict[str, LoraAdapter]:
    """The adapter of each part. A part without any of the named adapters is left out.

    `None` uses the active ones of each part.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names and list(adapter_names)
    present = {part: root_of(model)[1].configs.keys() for part, model in parts.items()}
    if names is not None and not (names and set().union(*present.values()).issuperset(names)):
        there = "; ".join(f"{part}: {', '.join(map(repr, configs))}" for part, configs in present.items())
        raise AdapterError(f"`adapter_names` must name adapters of the parts, got {names}. There are {there}.")
    own = {part: names and [name for name in names if name in present[part]] for part in parts}
    return {part: lora_adapter(model, own[part], rank) for part, model in parts.items() if own[part] != []}
