"""Adapters of a model in memory as one LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.keys import PREFIX, copy_key
from hra_fx.checkpoint.saving import auto_mapping, base_model_name
from hra_fx.compat import non_persistent_buffers
from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.sharding import first_sharded
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import all_copies
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.layer_form import check_expressible, lora_layer
from hra_fx.model.activate import check_copies
from hra_fx.model.offload import require_materialized
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, names_in, root_of

#: HRA's `bias` -> LoRA's, from the least to the most.
_BIASES = {"none": "none", "hra_only": "lora_only", "all": "all"}


def lora_adapter(
    model: nn.Module, adapter_names: str | Iterable[str] | None = None, rank: int | None = None
) -> LoraAdapter:
    """Some adapters of a model, in their order and at their strengths, as one LoRA.

    Args:
        model: a transformed model.
        adapter_names: the adapters, in the order of the product `W Q_a Q_b`. `None`: the active ones.
        rank: the largest rank of a layer. `None`: no limit.

    Raises:
        AdapterError: the model has no such adapters, `rank` is invalid, parameters are not in memory, or a tensor is
            not finite.
        FoldError: see `hra_fx.fold`.
        UnsupportedLayerError: a layer cannot be expressed as LoRA.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"`rank` must be a positive int or None, got {rank!r}.")
    root, record = root_of(model)
    names = _names(record, adapter_names)
    require_materialized(root)
    if sharded := first_sharded(root):
        raise AdapterError(
            f"{sharded[0]}: {sharded[1]} shards its parameters, so no process holds a whole weight. Save the adapter "
            "(hra_fx.save_adapter, in every process) and convert the files (hra-fx convert --to lora)."
        )
    check_copies(root, collect_parts(root), names)
    sites = {path: layer for path, layer in adapted_layers(root).items() if set(names) & set(layer.hra_u)}
    _check_places(root, sites)
    for path, layer in sites.items():
        check_expressible(path, layer, root.get_submodule(path.rpartition(".")[0]))
    present = {path: [name for name in names if name in layer.hra_u] for path, layer in sites.items()}
    configs = [record.configs[name] for name in names]
    saved = dict.fromkeys(name for config in configs for name in config.modules_to_save or ())
    return LoraAdapter(
        layers=tuple(lora_layer(path, layer, present[path], rank) for path, layer in sites.items()),
        copies=_copies(root, names, sites),
        modules=[path for path, _ in root.named_modules() if path and not _is_ours(path)],
        bias=_BIASES[max((config.bias for config in configs), key=list(_BIASES).index)],
        modules_to_save=tuple(saved),
        task_type=next((config.task_type for config in configs if config.task_type), None),
        auto_mapping=auto_mapping(root, configs[0]),
        base_model=next(filter(None, (base_model_name(root, config) for config in configs)), None),
        model_config=_model_config(root),
    )


def _names(record: AdapterState, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    names = record.active if adapter_names is None else names_in(record, adapter_names)
    if adapter_names is None and record.disabled:
        raise AdapterError("adapters are disabled. Name the adapters, or leave the disable_adapters block.")
    if not names:
        raise AdapterError(f"no adapter is active. Name at least one of {list(record.configs)}.")
    return names


def _check_places(root: nn.Module, sites: Mapping[str, AdaptedLayer]) -> None:
    """Refuse a layer that several modules own: PEFT's LoRA would replace it in the first one only."""
    paths = {layer: path for path, layer in sites.items()}
    owners: dict[str, list[str]] = {}
    for owner, module in root.named_modules():
        for name, child in module._modules.items():
            if child in paths:
                owners.setdefault(paths[child], []).append(f"{owner}.{name}".lstrip("."))
    for path, places in owners.items():
        if len(places) > 1:
            raise UnsupportedLayerError(
                f"{path}: this layer is also {', '.join(places[1:])}, and PEFT's LoRA would change it in one place "
                "only. Fold the model instead (hra_fx.fold), or leave the layer out with exclude_modules."
            )


def _copies(root: nn.Module, names: Iterable[str], sites: Mapping[str, AdaptedLayer]) -> dict[str, Tensor]:
    """The trained copies of the adapters, by PEFT's keys without its prefix."""
    found: dict[str, Tensor] = {}
    for path, (owner, copies) in all_copies(root).items():
        skipped = non_persistent_buffers(owner)
        for name in names:
            for entry, tensor in copies.tensors(owner, name).items():
                if entry not in skipped:
                    key = copy_key(path, entry, adapted=path in sites)
                    found[key.removeprefix(PREFIX)] = tensor.detach().cpu()
    return found


def _is_ours(path: str) -> bool:
    return not {REFLECTION, SAVED}.isdisjoint(path.split("."))


def _model_config(root: nn.Module) -> dict[str, Any]:
    config: Any = getattr(root, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    return entries if isinstance(entries, dict) else {}
