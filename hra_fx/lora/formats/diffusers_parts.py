"""The parts of a diffusers pipeline that have adapters, by the names under which diffusers loads LoRA."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hra_fx.errors import AdapterError, CheckpointError, HRAError
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.from_model import lora_adapter
from hra_fx.model.state import collect_parts, get_state, root_of
from hra_fx.model.unwrap import unwrap

#: Parts that diffusers lists as loadable, but loads only with a further argument (`load_into_transformer_2=True`).
_ON_REQUEST = ("transformer_2",)


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The adapted parts of a pipeline; of a UNet or transformer of diffusers, itself under the name of its part.

    Args:
        model: a diffusers pipeline, or a module.

    Returns:
        Name of the part, such as "unet", "transformer" or "text_encoder_2" -> model. Empty for a module that is not a
        diffusers model with LoRA support: a text encoder alone is a transformers model, saved in PEFT's format.

    Raises:
        AdapterError: it is neither a pipeline nor a module; or it has no adapters, or has some where
            `pipe.load_lora_weights` does not load any.
    """
    if not isinstance(model, nn.Module):
        return _adapted_components(model)
    # If diffusers is not loaded, no object is of its classes.
    loader = getattr(sys.modules.get("diffusers.loaders.peft"), "PeftAdapterMixin", None)
    inner = unwrap(model)
    if loader is None or not isinstance(inner, loader):
        return {}
    _check_root("the model", inner)
    return {_part(type(inner).__name__): inner}


def part_of_class(name: str | None) -> str | None:
    """The part that a diffusers model is, by the name of its class; `None` for any other model.

    Raises:
        CheckpointError: diffusers is not installed.

    >>> part_of_class("UNet2DConditionModel"), part_of_class("UNet2DModel"), part_of_class(None)
    ('unet', None, None)
    """
    if not name:
        return None
    if importlib.util.find_spec("diffusers") is None:
        raise CheckpointError(f"{name}: is a class of diffusers, which is not installed. Run: pip install diffusers.")
    kind = getattr(importlib.import_module("diffusers"), name, None)
    loader = importlib.import_module("diffusers.loaders.peft").PeftAdapterMixin
    return _part(name) if isinstance(kind, type) and issubclass(kind, loader) else None


def _part(class_name: str) -> str:
    # "transformer" is also where `load_lora_adapter` of a model looks by default.
    return "unet" if class_name.startswith("UNet") else "transformer"


def _adapted_components(pipeline: Any) -> dict[str, nn.Module]:
    kind = type(pipeline).__name__
    components = getattr(pipeline, "components", None)
    if not isinstance(components, Mapping):
        raise AdapterError(f"`model_or_pipeline` must be a torch.nn.Module or a diffusers pipeline, got {kind}.")
    modules = {name: unwrap(part) for name, part in components.items() if isinstance(part, nn.Module)}
    adapted = {name: part for name, part in modules.items() if collect_parts(part).reflections}
    if not adapted:
        names = ", ".join(modules) or "no modules"
        raise AdapterError(f"{kind}: none of its parts has adapters ({names}). Call hra_fx.transform on one first.")
    loadable = [name for name in getattr(pipeline, "_lora_loadable_modules", ()) if name not in _ON_REQUEST]
    for name, part in adapted.items():
        if name not in loadable:
            where = f"only into {', '.join(loadable)}" if loadable else "into no part of this pipeline"
            raise AdapterError(
                f"{name}: load_lora_weights of diffusers loads {where} without further arguments. Fold {name} "
                f"(hra_fx.fold), or save each part separately (hra_fx.save_as_lora(pipe.{name}, ...))."
            )
        _check_root(name, part)
    return adapted


def _check_root(name: str, part: nn.Module) -> None:
    """The keys are paths in the part, so it must be the model that was transformed."""
    roots = collect_parts(part).roots
    if roots and get_state(part) is None:
        path = next(path for path, module in part.named_modules() if module is roots[0])
        raise AdapterError(f"{name}: only its {path!r} was transformed. Transform the whole {type(part).__name__}.")


def adapters_of(
    parts: Mapping[str, nn.Module], adapter_names: str | Iterable[str] | None, rank: int | None
) -> dict[str, LoraAdapter]:
    """The adapter of each part, see `lora_adapter`.

    Args:
        parts: from `parts_of`.
        adapter_names: the adapters; a part that has none of them is left out. `None`: the active ones of each part.
        rank: the largest rank of a layer. `None`: no limit.

    Raises:
        AdapterError: no part has an adapter of this name.
        Other errors: see `lora_adapter`; the message names the part.
    """
    return {part: _adapter_of(part, parts[part], names, rank) for part, names in _names(parts, adapter_names).items()}


def _names(parts: Mapping[str, nn.Module], adapter_names: str | Iterable[str] | None) -> dict[str, list[str] | None]:
    """Part -> the given adapters that it has."""
    if adapter_names is None:
        return dict.fromkeys(parts)
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if not names:
        raise AdapterError("`adapter_names` must name at least one adapter. Use None for the active ones.")
    present = {part: root_of(model)[1].configs for part, model in parts.items()}
    for name in names:
        if not any(name in configs for configs in present.values()):
            there = "; ".join(f"{part}: {', '.join(map(repr, configs))}" for part, configs in present.items())
            raise AdapterError(f"no part has an adapter {name!r}. There are {there}.")
    chosen = {part: [name for name in names if name in configs] for part, configs in present.items()}
    return {part: own for part, own in chosen.items() if own}


def _adapter_of(part: str, model: nn.Module, names: list[str] | None, rank: int | None) -> LoraAdapter:
    try:
        return lora_adapter(model, names, rank)
    except HRAError as error:
        raise type(error)(f"{part}: {error}") from error
