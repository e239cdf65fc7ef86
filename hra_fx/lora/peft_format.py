"""An adapter in PEFT's LoRA format: the configuration and the tensors of the two files in its folder.

Source of the format: PEFT 0.21, `LoraConfig` and `get_peft_model_state_dict`. All layers have the same rank, because
servers read one rank and one alpha for the whole adapter. Layers with a smaller rank are padded with zeros.

For transformers models, PEFT converts the names in a LoRA like the names in a checkpoint. Source: PEFT 0.21,
`peft.utils.transformers_weight_conversion` and `_check_lora_target_modules_mamba`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import PREFIX
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.lora.adapter import LoraAdapter, LoraLayer, exact_targets
from hra_fx.lora.unsupported import unsupported
from hra_fx.selection.suggestions import suffixes

#: Architecture with checkpoints that transformers converts -> names in `target_modules` that PEFT interprets as single
#: experts: it adapts their stacked parameter instead, with the sum of all ranks, and no layer with that name.
_OF_EXPERTS: Mapping[Any, Collection[str]] = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}
#: Models in which PEFT does not adapt layers with these names.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_IN_MAMBA = ("out_proj", "conv1d")


def peft_form(
    adapter: LoraAdapter, dtype: torch.dtype, *, rank_pattern: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `adapter_config.json` and of `adapter_model.safetensors`.

    The factors get the dtype; trained copies keep theirs. With `rank_pattern`, layers keep their ranks.
    """
    layers = {layer.path: layer for layer in adapter.layers}
    common = adapter.rank
    parameters = parameter_targets(adapter)
    own = {path for path in layers if rank_pattern and path not in parameters}  # PEFT warns about parameter ranks
    ranks = {path: max(1, layer.rank) if path in own else common for path, layer in layers.items()}
    factors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        # Cast immediately, so that only one layer has a second copy in float64.
        A, B = (factor.to(dtype).contiguous() for factor in layer.padded(ranks[path]))
        if layer.kind == "experts":
            factors |= _experts_tensors(layer, adapter.layers, A, B)
            continue
        # A convolution with as many filters as the rank.
        factors[f"{path}.lora_A.weight"] = A.reshape(len(A), -1, *layer.kernel) if layer.kernel else A
        factors[f"{path}.lora_B.weight"] = B.reshape(*B.shape, *(1 for _ in layer.kernel))
        if layer.kind == "attention":
            # PEFT adapts the output projection together with `in_proj_weight`.
            key, width, rank = f"{path}.base_layer.out_proj", A.shape[1], ranks[path]
            factors[f"{key}.lora_A.weight"] = torch.zeros(rank, width, dtype=dtype)
            factors[f"{key}.lora_B.weight"] = torch.zeros(width, rank, dtype=dtype)
    copies = {_peft_key(key, layers): tensor for key, tensor in adapter.copies.items()}
    return _config(adapter, ranks, parameters), {f"{PREFIX}{key}": tensor for key, tensor in (factors | copies).items()}


def _config(adapter: LoraAdapter, ranks: Mapping[str, int], parameters: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` that differ from its defaults, or that servers read."""
    # PEFT compares a key with the end of a path, so a path that is itself the end of another path needs a "^".
    others = {end for path in ranks for end in suffixes(path) if end != path}
    other = {f"^{path}" if path in others else path: rank for path, rank in ranks.items() if rank != adapter.rank}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "auto_mapping": adapter.auto_mapping,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": exact_targets([path for path in ranks if path not in parameters], adapter.modules),
        "target_parameters": list(parameters.values()) or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers),
        "bias": adapter.bias,
        "modules_to_save": list(adapter.modules_to_save) or None,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "use_rslora": False,
        "use_dora": False,
    }


def _peft_key(key: str, layers: Mapping[str, LoraLayer]) -> str:
    """The key of a trained copy. PEFT also wraps the output projection of adapted attention."""
    parent, _, name = key.removesuffix(".bias").rpartition(".")
    inside = name == "out_proj" and parent in layers and layers[parent].kind == "attention"
    return f"{parent}.base_layer.out_proj.base_layer.bias" if inside else key


def _experts_tensors(layer: LoraLayer, layers: Iterable[LoraLayer], A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """The two tensors of the experts in one parameter, in the layout of PEFT's `ParamWrapper`.

    PEFT wraps a module once for each of its adapted parameters. The wrappers are nested, and the outermost one belongs
    to the last parameter. Source: `peft.tuners.lora.layer.ParamWrapper`, PEFT 0.21. From `A: (experts, rank, d)` and
    `B: (experts, out, rank)`, they are `lora_A.weight: (experts * rank, d)`, with the ranks of each expert next to each
    other, and `lora_B.weight: (out, rank * experts)`, with the experts of each rank next to each other.
    """
    owner = layer.path.rpartition(".")[0]
    outside = [one for one in layers if one.kind == "experts" and one.path.rpartition(".")[0] == owner]
    depth = sum(one.place > layer.place for one in outside)
    place = ".".join([owner, *["base_layer"] * depth]).lstrip(".")
    down, up = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return {f"{place}.lora_A.weight": down.contiguous(), f"{place}.lora_B.weight": up.contiguous()}


def parameter_targets(adapter: LoraAdapter) -> dict[str, str]:
    """The layers that PEFT finds by a parameter in `target_parameters`: path -> parameter.

    These are experts, and layers with names that PEFT interprets as single experts.
    """
    found = {layer.path: parameter_of(layer.path) for layer in adapter.layers if layer.kind == "experts"}
    if has_experts(adapter.modules):
        patterns = getattr(_conversions(), "_MODEL_TO_CONVERSION_PATTERN", {})
        names = _OF_EXPERTS.get(patterns.get(adapter.model_config.get("model_type")), ())
        linear = [layer.path for layer in adapter.layers if layer.kind == "linear"]
        found |= {path: f"{path}.weight" for path in linear if path.rpartition(".")[2] in names}
    return found


def has_experts(modules: Iterable[str]) -> bool:
    """Whether a model has a module with a name for experts, so that transformers converts checkpoints for it."""
    return any(path.rpartition(".")[2] == "experts" for path in modules)


def check_names(paths: Iterable[str], model_type: str | None, renamings: Sequence[Any] = ()) -> None:
    """Check that PEFT adapts these layers, and finds them by their names in the file.

    For `renamings`, see `renamings_of`.
    """
    for path in paths:
        if model_type in _MAMBA and path.rpartition(".")[2] in _NOT_IN_MAMBA:
            raise unsupported(path, "this layer", "has a name that PEFT's LoRA does not support in Mamba models")
        renamed = _rename(path, renamings)
        if not f"{PREFIX}{path}".endswith(renamed):  # PEFT restores a prefix that is removed
            reason = f"would not be found by PEFT, which renames it to {renamed}, as transformers does in checkpoints"
            raise unsupported(path, "this layer", reason)


def renamings_of(model: Any) -> list[Any]:
    """Return transformers' renamings of tensors in a model's checkpoint, if PEFT renames LoRA tensors the same way."""
    kind = model_type_of(model)
    if kind is None or _conversions().get_checkpoint_conversion_mapping(kind) is None:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [entry for entry in _conversions().get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]


def model_type_of(model: Any) -> str | None:
    """The type of a transformers model."""
    kind: str | None = getattr(getattr(model, "config", None), "model_type", None)
    return kind


def _conversions() -> Any:
    return importlib.import_module("transformers.conversion_mapping")  # imported late, because it takes seconds


def _rename(path: str, renamings: Sequence[Any]) -> str:
    if not renamings:
        return path
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(f"{path}.lora_A", list(renamings), [])[0].removesuffix(".lora_A")
