"""Convert adapters of a model in memory to one LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.base_model import auto_mapping, base_model_name
from hra_fx.checkpoint.folder import PREFIX, copy_key
from hra_fx.compat import state_modules
from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.sharding import full_tensor
from hra_fx.layers.target import ADAPTER_CHILDREN
from hra_fx.layers.trained_copies import copies_of
from hra_fx.lora.adapter import LoraAdapter, check_names
from hra_fx.lora.from_layer import lora_layer
from hra_fx.lora.unsupported import check_places, check_reads, checked_layers
from hra_fx.model.state import AdapterState, names_in, root_of, unwrap

#: HRA's `bias` -> LoRA's `bias`, from the fewest to the most biases.
_BIASES = {"none": "none", "hra_only": "lora_only", "all": "all"}


def lora_adapter(
    model: nn.Module, adapter_names: str | Iterable[str] | None = None, rank: int | None = None
) -> LoraAdapter:
    """Convert adapters of a model, in order and at their scales, to one LoRA.

    `adapter_names` are in the order of the product `W Q_a Q_b`; `None` for the active ones. `rank` is the largest rank.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise AdapterError(f"`rank` must be a positive int or None, got {rank!r}.")
    root, state = root_of(model)
    whole = unwrap(model)
    # Runtimes load the LoRA into the whole model, even if only a part of it was transformed.
    prefix = "".join(f"{path}." for path, module in state_modules(whole) if module is root and path)
    names = _names(state, adapter_names)
    layers = checked_layers(root, state, names)
    placed = {f"{prefix}{path}": layer for path, layer in layers.items()}
    check_names(whole, placed)
    check_places(whole, placed)
    check_reads(whole, placed)
    present = {path: [name for name in names if name in layer.hra_u] for path, layer in layers.items()}
    configs = [state.configs[name] for name in names]
    config: Any = getattr(whole, "config", None)
    return LoraAdapter(
        layers=tuple(lora_layer(f"{prefix}{path}", layer, present[path], rank) for path, layer in layers.items()),
        copies={f"{prefix}{key}": tensor for key, tensor in _copies(root, names, layers).items()},
        modules=[path for path, _ in state_modules(whole) if path and ADAPTER_CHILDREN.isdisjoint(path.split("."))],
        fields={
            "bias": _BIASES[max((own.bias for own in configs), key=list(_BIASES).index)],
            "modules_to_save": list(dict.fromkeys(name for own in configs for name in own.modules_to_save or ()))
            or None,
            "task_type": next((own.task_type for own in configs if own.task_type), None),
            "auto_mapping": auto_mapping(whole, configs[0]),
            "base_model_name_or_path": base_model_name(whole, configs[0]),
        },
        model_config=config.to_dict() if hasattr(config, "to_dict") else {},
    )


def _names(state: AdapterState, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    names = state.active if adapter_names is None else names_in(state, adapter_names)
    if adapter_names is None and state.disabled:
        raise AdapterError("adapters are disabled. Name the adapters, or leave the disable_adapters block.")
    if not names:
        raise AdapterError(f"no adapter is active. Name at least one of {list(state.configs)}.")
    return names


def _copies(root: nn.Module, names: Iterable[str], layers: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """The trained copies of the adapters, by PEFT's keys without the prefix."""
    found: dict[str, Tensor] = {}
    for name in names:
        for (path, entry), tensor in copies_of(root, name).items():
            key = copy_key(path, entry, adapted=path in layers)
            found[key.removeprefix(PREFIX)] = full_tensor(tensor.detach()).cpu()
    return found
