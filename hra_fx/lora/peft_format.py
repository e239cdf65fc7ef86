"""An adapter as PEFT's LoRA: the configuration and the tensors of the two files of its folder.

Source of the format: PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`. All layers have one rank, because servers
read one rank and one alpha for the whole adapter; layers of a smaller rank are padded with zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import write
from hra_fx.checkpoint.keys import PREFIX
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.targets import exact_targets


def peft_form(
    adapter: LoraAdapter, dtype: torch.dtype, *, rank_pattern: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `adapter_config.json` and of `adapter_model.safetensors`.

    Args:
        adapter: the adapter.
        dtype: of the factors; trained copies keep theirs.
        rank_pattern: keep the rank of each layer, with PEFT's `rank_pattern` and `alpha_pattern`.
    """
    layers = _with_attentions(adapter)
    ranks = {path: max(1, layer.rank) if rank_pattern else adapter.rank for path, layer in layers.items()}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        A, B = layer.padded(ranks[path])
        key = f"{PREFIX}{_peft_path(layer)}"
        tensors[f"{key}.lora_A.weight"] = _as_filters(A, layer).to(dtype)
        tensors[f"{key}.lora_B.weight"] = B.reshape(*B.shape, *(1 for _ in layer.kernel)).to(dtype).contiguous()
    tensors |= {f"{PREFIX}{_peft_key(key, layers)}": tensor for key, tensor in adapter.copies.items()}
    return _config(adapter, layers, ranks), tensors


def write_peft(adapter: LoraAdapter, folder: Path, dtype: torch.dtype, *, rank_pattern: bool = False) -> None:
    """Write the folder, atomically.

    Raises:
        CheckpointError: it cannot be written.
    """
    config, tensors = peft_form(adapter, dtype, rank_pattern=rank_pattern)
    write(folder, json.dumps(config, indent=2, sort_keys=True), tensors, {})


def _config(adapter: LoraAdapter, layers: Mapping[str, LoraLayer], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that differ from its defaults, or that servers read."""
    other = {path: rank for path, rank in ranks.items() if rank != adapter.rank}
    targets = [path for path, layer in layers.items() if not layer.in_attention]
    # PEFT adapts the out_proj of an attention together with it, so it must not match by itself: it stays in `modules`.
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "auto_mapping": adapter.auto_mapping,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": exact_targets(targets, adapter.modules),
        "fan_in_fan_out": any(layer.columns for layer in layers.values()),
        "bias": adapter.bias,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "use_rslora": False,
        "use_dora": False,
    }


def _with_attentions(adapter: LoraAdapter) -> dict[str, LoraLayer]:
    """All layers by path; PEFT adapts an attention's `in_proj` and `out_proj` together, so the other one gets zeros."""
    layers = {layer.path: layer for layer in adapter.layers}
    for layer in adapter.layers:
        width = layer.A.shape[1]
        if layer.kind == "attention" and f"{layer.path}.out_proj" not in layers:
            path = f"{layer.path}.out_proj"
            layers[path] = _unchanged(path, width, width, in_attention=True)
        parent = layer.path.rpartition(".")[0]
        if layer.in_attention and parent not in layers:
            layers[parent] = _unchanged(parent, width, 3 * width, in_attention=False)
    return layers


def _unchanged(path: str, width: int, out: int, *, in_attention: bool) -> LoraLayer:
    nothing = torch.zeros(0, width, dtype=torch.float64), torch.zeros(out, 0, dtype=torch.float64)
    return LoraLayer(path, "linear" if in_attention else "attention", *nothing, in_attention=in_attention)


def _peft_path(layer: LoraLayer) -> str:
    """The path under which PEFT stores a layer: it wraps an attention around its `out_proj`."""
    parent, _, name = layer.path.rpartition(".")
    return f"{parent}.base_layer.{name}" if layer.in_attention else layer.path


def _peft_key(key: str, layers: Mapping[str, LoraLayer]) -> str:
    """The key of a trained copy; PEFT wraps every adapted layer, also the `out_proj` of an attention."""
    path, _, entry = key.replace(".base_layer.", ".").rpartition(".")
    return f"{_peft_path(layers[path])}.base_layer.{entry}" if path in layers else key


def _as_filters(A: Tensor, layer: LoraLayer) -> Tensor:
    """`A` as the weight of a convolution with as many filters as its rank; of other layers, itself."""
    return A.reshape(len(A), -1, *layer.kernel) if layer.kernel else A
