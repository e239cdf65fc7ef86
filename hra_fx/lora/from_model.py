"""Convert adapters of a model in memory to one LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hra_fx.checkpoint.folder import PREFIX, copy_key
from hra_fx.checkpoint.saving import auto_mapping, base_model_name, layers_with
from hra_fx.compat import state_modules
from hra_fx.errors import AdapterError
from hra_fx.functional import low_rank
from hra_fx.functional.rotate import as_rows, check_foldable
from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.experts_weight import is_transposed, parameter_of
from hra_fx.layers.quantized.libraries import quant_scheme_of
from hra_fx.layers.sharding import full_tensor, gathered
from hra_fx.layers.target import ADAPTER_CHILDREN, weight_place
from hra_fx.layers.trained_copies import copies_of
from hra_fx.lora.adapter import LoraAdapter, LoraLayer, check_names
from hra_fx.lora.unsupported import check_expressible, check_places, check_reads
from hra_fx.model.merge import base_weight
from hra_fx.model.state import AdapterState, adapted_layers, names_in, root_of, unwrap
from hra_fx.model.trainable import check_copies
from hra_fx.model.whole import check_whole

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
    layers = _checked_layers(root, state, names)
    placed = {f"{prefix}{path}": layer for path, layer in layers.items()}
    check_names(whole, placed)
    check_places(whole, placed)
    check_reads(whole, placed)
    present = {path: [name for name in names if name in layer.hra_u] for path, layer in layers.items()}
    configs = [state.configs[name] for name in names]
    config: Any = getattr(whole, "config", None)
    return LoraAdapter(
        layers=tuple(_lora_layer(f"{prefix}{path}", layer, present[path], rank) for path, layer in layers.items()),
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


def _checked_layers(root: nn.Module, state: AdapterState, names: tuple[str, ...]) -> dict[str, AdaptedLayer]:
    """The layers with at least one of the adapters, by path. LoRA must support all of them."""
    check_whole(root, "convert its adapters to LoRA", "weights")
    check_copies(root, names)
    paths = {path for name in names for path in layers_with(root, state, name)}
    layers = {path: layer for path, layer in adapted_layers(root).items() if path in paths}
    for path, layer in layers.items():
        check_expressible(path, layer, root.get_submodule(path.rpartition(".")[0]))
    return layers


def _lora_layer(path: str, layer: AdaptedLayer, names: Sequence[str], rank: int | None) -> LoraLayer:
    """Convert a layer with some of its adapters, in the order of the product, to its LoRA form."""
    adapters: Any = layer.hra_u
    owner = weight_place(layer)[0]
    with loaded(owner), gathered(dict.fromkeys((owner, layer, *adapters.modules()))):
        for name in names:
            check_foldable(path, layer.hra_base, adapters[name], apply_GS=adapters.specs[name].apply_GS, adapter=name)
        rows, kernel = _rows(layer)
        chain = adapters.joint_vectors(names, torch.float32 if rows.device.type == "mps" else torch.float64)
        chain = torch.zeros(*rows.shape[:-2], rows.shape[-1], 0) if chain is None else chain
        chains = chain if chain.dim() == 3 else chain[None]
        changes = []
        for W, U in zip(rows, chains, strict=True):
            V, K = low_rank.core(U)
            # A weight that does not change is not read.
            projected = low_rank.project(W, V) if len(K) else torch.zeros(len(W), 0, dtype=torch.float64)
            changes.append(low_rank.low_rank_delta(projected, V, K, rank))
    if adapters.kind == "experts":
        return _of_experts(path, layer, changes)
    A, B, error = changes[0]
    return LoraLayer(path, adapters.kind, A, B, kernel, adapters.fan_in_fan_out, error)


def _rows(layer: AdaptedLayer) -> tuple[Tensor, tuple[int, ...]]:
    """The weight of each expert, or of the layer, as `(experts or 1, out, d)`; and the kernel size of a convolution."""
    adapters: Any = layer.hra_u
    if adapters.kind == "experts":
        return adapters.rows(base_weight(layer).detach()), ()
    scheme = quant_scheme_of(layer)
    weight = (base_weight(layer) if scheme is None else scheme.values(layer)).detach()
    kernel = tuple(weight.shape[2:]) if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else ()
    return as_rows(weight, transposed=adapters.fan_in_fan_out and scheme is None)[None], kernel


def _of_experts(path: str, layer: Any, changes: Sequence[low_rank.LowRankDelta]) -> LoraLayer:
    """The LoRA form of the experts in one parameter, with the largest rank of an expert."""
    longest = max(len(A) for A, _, _ in changes)
    A = torch.stack([F.pad(A, (0, 0, 0, longest - len(A))) for A, _, _ in changes])
    B = torch.stack([F.pad(B, (0, longest - B.shape[1])) for _, B, _ in changes])
    # PEFT assumes `(experts, out, in)` for parameters of classes without `is_transposed`. If they are stored as
    # `(experts, in, out)`, the two factors are swapped.
    if is_transposed(layer.owner) and not getattr(layer.owner, "is_transposed", False):
        A, B = B.mT.contiguous(), A.mT.contiguous()
    place = list(layer.owner._parameters).index(parameter_of(path).rpartition(".")[2])
    return LoraLayer(path, "experts", A, B, error=max(error for *_, error in changes), place=place)


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
