"""Read adapters and the weights of their base model from disk as LoRA; the model is never loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence

from torch import Tensor, nn

from hra_fx.checkpoint.adapter import Adapter, read_adapter
from hra_fx.checkpoint.disk.architecture import CONFIG, IN_MEMORY
from hra_fx.checkpoint.disk.arguments import Source
from hra_fx.checkpoint.disk.plan import rotation_of
from hra_fx.checkpoint.disk.requests import (
    Requests,
    check_base,
    check_complete,
    check_embeddings,
    check_given,
    is_new,
    requests_of,
    unknown_tensor,
)
from hra_fx.checkpoint.disk.rotation import Rotation
from hra_fx.checkpoint.disk.stored import StoredTensor
from hra_fx.checkpoint.keys import PREFIX, copy_key
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.arguments import check_rank, lora_bias
from hra_fx.lora.disk.base_files import BaseFiles, open_base, parents
from hra_fx.lora.disk.checks import check_layers
from hra_fx.lora.disk.experts import StoredExperts
from hra_fx.lora.disk.layers import StoredLayer, convert_layers


def read_as_lora(
    adapters: Sequence[Source],
    base: Source,
    *,
    rank: int | None = None,
    columns: Collection[str] | None = None,
    progress: bool = True,
    check: Callable[[LoraAdapter], object] = lambda adapter: None,
) -> LoraAdapter:
    """The LoRA form of adapters on disk, applied in order.

    Only the weights of adapted layers are read, block by block. Products with 16-bit weights are computed in float32,
    others in float64. A model is built, without weights, only to find out about convolutions, experts, tied output
    layers, weights stored as `(in, out)` and weights that other modules may read; the classes of linear layers are not
    checked as in `hra_fx.convert_to_lora`.

    Args:
        adapters: folders of adapters saved by PEFT or hra_fx, or their names on the Hub.
        base: folder of the base model, with safetensors files.
        rank: the largest rank of a layer. `None`: no limit, and the LoRA is exact.
        columns: layers that store their weight as `(in, out)`, see `hra_fx.fold_checkpoint`.
        progress: show a progress bar on a terminal.
        check: called with the adapter at rank 0 before weights are read, to raise what can be known by then.

    Raises:
        CheckpointError: a file is missing or damaged, an adapter does not fit the base, a weight is quantized or not
            finite, or adapters exclude each other.
        AdapterError: `rank` is not positive.
        UnsupportedLayerError: LoRA cannot express a layer, see `hra_fx.convert_to_lora`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, save_adapter, transform
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(nn.Sequential(nn.Linear(6, 4)).state_dict(), Path(folder, "model.safetensors"))
        ...     model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=3, target_modules=["0"]))
        ...     save_adapter(model, Path(folder, "adapter"))
        ...     lora = read_as_lora([Path(folder, "adapter")], folder)
        >>> [(layer.path, layer.rank) for layer in lora.layers]
        [('0', 0)]
    """
    check_rank(rank)
    if not adapters:
        raise CheckpointError("adapters must name at least one adapter. Give a folder, or several in order.")
    files = [read_adapter(source) for source in adapters]
    opened = open_base(base, files)
    check_base(files, opened.architecture.folder, opened.found, opened.names, folded=False)
    requests = requests_of(files, opened.found, opened.names)
    layers = _layers_of(opened, requests, files, columns)
    check_layers(opened, {layer.path: layer.kind for layer in layers})
    copies = _copies_of(opened, requests, files, {layer.path for layer in layers})
    check_embeddings(opened.found, files, opened.names, opened.stored)
    for file in files:
        check_complete(opened.found, file, opened.architecture, opened.names)
    configs = [file.config for file in files]
    paths = [*opened.modules(), *(path for layer in layers for path in (layer.path, *parents(layer.path)))]
    planned = LoraAdapter(
        layers=tuple(layer.unchanged() for layer in layers),
        copies=copies,
        modules=tuple(dict.fromkeys(paths)),
        bias=lora_bias(config.bias for config in configs),
        modules_to_save=tuple(dict.fromkeys(name for config in configs for name in config.modules_to_save or ())),
        task_type=next((config.task_type for config in configs if config.task_type), None),
        auto_mapping=next((config.auto_mapping for config in configs if config.auto_mapping), None),
        base_model=next((str(name) for config in configs if (name := config.base_model_name_or_path)), os.fspath(base)),
        model_config=opened.architecture.entries,
    )
    check(planned)
    return dataclasses.replace(planned, layers=tuple(convert_layers(layers, rank, progress=progress)))


def _layers_of(
    opened: BaseFiles, requests: Requests, adapters: Sequence[Adapter], columns: Collection[str] | None
) -> list[StoredLayer | StoredExperts]:
    """The layers, in the order of their numbers."""
    weights: dict[str, list[tuple[StoredTensor, Rotation]]] = {}
    for name, chains in requests.chains.items():
        stored = opened.stored(name)
        if stored is None:
            raise unknown_tensor(name, opened.found, adapters, opened.names)
        rotation = rotation_of(stored, chains, opened.architecture, columns)
        weights.setdefault(chains[0].path, []).extend(rotation.matrices(stored))
    layers: list[StoredLayer | StoredExperts] = []
    for path, parts in weights.items():
        noise = sum(adapter.noise(path) for adapter in adapters)
        if opened.names.parameter(path) is None:
            layers.append(StoredLayer(path, *parts[0], noise))
        else:
            count = next(len(adapter.chains[path]) for adapter in adapters if path in adapter.chains)
            experts = [parts[i::count] for i in range(count)]
            layers.append(StoredExperts(path, _owner(opened, path), experts, noise))
    return sorted(layers, key=lambda layer: _in_order(layer.path))


def _owner(opened: BaseFiles, path: str) -> nn.Module:
    """The module with the parameter that a layer stands for."""
    owner = opened.architecture.find(path.rpartition(".")[0])
    if owner is None:
        raise CheckpointError(
            f"{opened.architecture.folder}: there is no {CONFIG} of a transformers model with {parameter_of(path)}, so "
            f"it is unknown how PEFT names the LoRA of its experts. {IN_MEMORY}"
        )
    return owner


def _in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in paths by their values."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _copies_of(
    opened: BaseFiles, requests: Requests, adapters: Sequence[Adapter], adapted: Collection[str]
) -> dict[str, Tensor]:
    """Trained biases and modules, by their keys in PEFT's file without its prefix."""
    copies = {}
    for name, tensor in requests.full.items():
        stored = opened.stored(name)
        if stored is not None:
            check_given(name, tensor, stored)
        elif not is_new(name, adapters):
            raise unknown_tensor(name, opened.found, adapters, opened.names)
        path, _, entry = opened.to_adapter(name).rpartition(".")
        copies[copy_key(path, entry, adapted=path in adapted).removeprefix(PREFIX)] = tensor
    return copies
