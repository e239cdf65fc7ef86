"""What PEFT makes of the names in a LoRA for a model of transformers: it converts them like those in a checkpoint.

Source: PEFT 0.21, `peft.utils.transformers_weight_conversion` and `_check_lora_target_modules_mamba`.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hra_fx.checkpoint.keys import PREFIX
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.unsupported import unsupported

#: Architecture whose checkpoints transformers converts -> names in `target_modules` that PEFT takes for single experts:
#: it adapts their stacked parameter instead, with the ranks of all added up, and no layer of that name.
_OF_EXPERTS: Mapping[Any, Collection[str]] = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}
#: Models that PEFT does not adapt layers with these names in.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_NOT_IN_MAMBA = ("out_proj", "conv1d")


def parameter_targets(adapter: LoraAdapter) -> dict[str, str]:
    """The layers that PEFT finds by a parameter in `target_parameters`: path -> parameter.

    These are experts, and layers whose names PEFT takes for those of single experts.
    """
    found = {layer.path: parameter_of(layer.path) for layer in adapter.layers if layer.kind == "experts"}
    if has_experts(adapter.modules):
        names = _names_of_experts(adapter.model_config.get("model_type"))
        linear = [layer.path for layer in adapter.layers if layer.kind == "linear"]
        found |= {path: f"{path}.weight" for path in linear if path.rpartition(".")[2] in names}
    return found


def has_experts(modules: Iterable[str]) -> bool:
    """Whether a model has a module with the name of experts, for which transformers converts checkpoints."""
    return any(path.rpartition(".")[2] == "experts" for path in modules)


def check_names(paths: Iterable[str], model_type: str | None, renamings: Sequence[Any] = ()) -> None:
    """Refuse layers that PEFT does not adapt, or would not find by their names in the file.

    Args:
        paths: the adapted layers.
        model_type: that of the model, if it is one of transformers.
        renamings: see `renamings_of`.

    Raises:
        UnsupportedLayerError: naming the layer and the reason.
    """
    for path in paths:
        if model_type in _MAMBA and path.rpartition(".")[2] in _NOT_IN_MAMBA:
            raise unsupported(path, "this layer", "has a name that PEFT's LoRA refuses in Mamba models")
        renamed = _rename(path, renamings)
        if not f"{PREFIX}{path}".endswith(renamed):  # PEFT restores a prefix that is removed
            reason = f"would not be found by PEFT, which renames it to {renamed}, as transformers does in checkpoints"
            raise unsupported(path, "this layer", reason)


def renamings_of(model: Any) -> list[Any]:
    """How transformers renames tensors in checkpoints of a model, if PEFT does the same with those of a LoRA."""
    kind = model_type_of(model)
    if kind is None or _conversions().get_checkpoint_conversion_mapping(kind) is None:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [entry for entry in _conversions().get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]


def model_type_of(model: Any) -> str | None:
    """The type of a model of transformers."""
    kind: str | None = getattr(getattr(model, "config", None), "model_type", None)
    return kind


def _names_of_experts(model_type: str | None) -> Collection[str]:
    return _OF_EXPERTS.get(getattr(_conversions(), "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type), ())


def _conversions() -> Any:
    return importlib.import_module("transformers.conversion_mapping")  # late, since it takes seconds


def _rename(path: str, renamings: Sequence[Any]) -> str:
    if not renamings:
        return path
    from transformers.core_model_loading import rename_source_key

    return rename_source_key(f"{path}.lora_A", list(renamings), [])[0].removesuffix(".lora_A")
