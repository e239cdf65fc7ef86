"""`save_adapter`: write an adapter in PEFT's format, so that PEFT loads it with the same outputs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.checkpoint.base_model import auto_mapping, base_model_name, base_row
from hra_fx.checkpoint.card import CARD_NAME, create_or_update_model_card
from hra_fx.checkpoint.folder import (
    PREFIX,
    adapter_entries,
    copy_key,
    output_folder,
    reflection_key,
    write,
    write_weights,
)
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.functional.chain import GRAM_SCHMIDT, KEPT, chain_of, vectors_of
from hra_fx.layers.sharding import full_tensor, is_dtensor, on_first_rank
from hra_fx.layers.target import KEPT as SUFFIX, REFLECTION
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.state import AdapterState, adapted_layers, layers_with, name_in, names_in, root_of
from hra_fx.model.whole import check_whole
from hra_fx.selection.select import resolve_targets

#: Folder names of checkpoints of transformers' Trainer.
_CHECKPOINT = re.compile(r"checkpoint-\d+")

#: The configuration, the tensors and the metadata of an adapter's two files.
_Contents: TypeAlias = tuple[HRAConfig, dict[str, Tensor], dict[str, str]]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Save an adapter to a folder: `adapter_config.json` and `adapter_model.safetensors`, in PEFT's format.

    PEFT loads the folder with the same outputs, unless layers have different ranks (`rank_pattern`): each layer is
    saved with its own rank, but PEFT's HRA has a single rank and raises an error (size mismatch). For PEFT,
    call `save_as_lora`.

    Both files are written atomically. The adapter is saved with its trained copies of `modules_to_save` and biases. At
    a scale other than 1 (see `set_scale`), the file has the scaled adapter as plain reflections, so the loaded adapter
    has scale 1 and the same outputs, also in PEFT.

    With DDP, one process calls this function. With `fully_shard`, all processes must call it: they gather the vectors,
    and the first process writes.

    Args:
        model: a transformed model.
        directory: the folder, created if needed.
        adapter_name: the adapter; `None` for the only adapter, or the only active one.

    Raises:
        AdapterError: the model has no such adapter, `None` is ambiguous, parts of the model were folded or replaced, or
            accelerate offloads trained copies.
        CheckpointError: a tensor is not finite or has no data; or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    root, record = root_of(model)
    candidates = record.configs if len(record.configs) == 1 else record.active
    if adapter_name is None and len(candidates) != 1:
        raise AdapterError(
            f"adapter_name is required: the model has the adapters {list(record.configs)}, with "
            f"{list(record.active)} active."
        )
    name = name_in(record, next(iter(candidates)) if adapter_name is None else adapter_name)
    config, tensors, metadata = _contents(root, record, name, _state_of(root))
    on_first_rank(root.parameters(), lambda: write(directory, config.to_json_string(), tensors, **metadata))


def save_adapters(
    model: nn.Module,
    directory: str | os.PathLike[str],
    selected_adapters: Iterable[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    is_main_process: bool = True,
) -> None:
    """Save several adapters like PEFT's `save_pretrained`: "default" to the folder, others to subfolders.

    A model card is also written, if the folder does not contain one. In a checkpoint folder of transformers' Trainer,
    the adapters' entries of the state are also saved to `model.safetensors`, from which the Trainer resumes bit by bit,
    with pairs and kept directions. PEFT's own models would find none of their names there, and go on from initial
    vectors. So the file also has an empty tensor with PEFT's name, for which their `load_state_dict` raises an error.

    `state_dict` is the model's state, if a wrapper (FSDP, DeepSpeed, a `PeftModel`) has gathered it. With `fully_shard`
    and no `state_dict`, all processes must call this function, as for `save_adapter`. Errors are those of
    `save_adapter`.
    """
    (root, record), folder = root_of(model), output_folder(directory)
    names = names_in(record, record.configs if selected_adapters is None else selected_adapters)
    if not names:
        raise AdapterError("selected_adapters must not be empty. Use None to save all adapters.")
    given = _state_of(root) if state_dict is None else state_dict
    state = {key.removeprefix(PREFIX): tensor for key, tensor in given.items()}
    shards = [tensor for tensor in state.values() if is_dtensor(tensor)]
    if not (is_main_process or shards):
        return
    contents = {name: _contents(root, record, name, state) for name in names}
    checkpoint = _CHECKPOINT.fullmatch(folder.name) and not (folder / "config.json").exists()
    keys = [key for key in adapter_entries(root) if key in state] if checkpoint else []
    entries = {key: full_tensor(state[key]) for key in keys}
    entries |= {f"{PREFIX}{key}": torch.empty(0) for key in keys if f".{REFLECTION}." in key}

    def write_all() -> None:
        for name, (config, tensors, metadata) in contents.items():
            write(folder if name == "default" else folder / name, config.to_json_string(), tensors, **metadata)
        if entries:
            write_weights(folder / "model.safetensors", entries)
        if not (folder / CARD_NAME).exists():
            create_or_update_model_card(root, folder)

    on_first_rank(shards, write_all)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return the tensors of an adapter with the keys of its file, like `peft.get_peft_model_state_dict`.

    Args:
        model: a transformed model.
        state_dict: the model's state, if a wrapper has gathered it.
        adapter_name: name of the adapter.

    Raises:
        AdapterError: the model has no such adapter. Or without `state_dict`, this process has flat shards of vectors
            (FSDP1, ZeRO-3), or accelerate offloads trained copies or a whole module.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(get_peft_model_state_dict(model))
        ['base_model.model.0.hra_u']
    """
    root, record = root_of(model)
    name_in(record, adapter_name)
    return _contents(root, record, adapter_name, _state_of(root) if state_dict is None else state_dict)[1]


def _state_of(root: nn.Module) -> dict[str, Tensor]:
    """The state of a model. Vectors that accelerate offloads are loaded first, because they are on the meta device."""
    check_whole(root, "save its adapters")
    return root.state_dict()


def _contents(root: nn.Module, record: AdapterState, name: str, state: Mapping[str, Tensor]) -> _Contents:
    config, sites, layers = record.configs[name], layers_with(root, record, name), adapted_layers(root)
    entries = {path: f"{path}.{REFLECTION}.{name}" for path in sites}
    directions = {path: entry + SUFFIX for path, entry in entries.items() if layers[path].hra_u.kept(name) is not None}
    for path in sites:
        layers[path].hra_u.check_parameter(name)
    if missing := [entry for entry in (*entries.values(), *directions.values()) if entry not in state]:
        raise AdapterError(
            f"state_dict has no entry {missing[0]!r}. Pass the state of the whole model. With transformers' Trainer "
            "and ZeRO-3, set `stage3_gather_16bit_weights_on_model_save` to true in DeepSpeed's configuration."
        )
    tensors: dict[str, Tensor] = {}
    is_scaled = name in layers[sites[0]].hra_u.scales  # as in all layers
    for path in sites:
        adapters = layers[path].hra_u
        form, trained, kept = adapters.form(name), full_tensor(state[entries[path]]), None
        if is_scaled:
            form, trained = 0, adapters.chain(name)
        elif form & KEPT:
            kept = state[directions[path]]
        tensors[reflection_key(path)] = vectors_of(form, trained, kept)
    form = GRAM_SCHMIDT * (config.apply_GS and not is_scaled)
    chains = {path: chain_of(form, tensors[reflection_key(path)]) for path in sites}
    row = base_row({path: layers[path] for path in sites}, chains)
    owners = all_copies(root)
    for path, entry in copies_of(root, name):
        owner, copies = owners[path]
        key = f"{path}.{copies.entries(owner)[name, entry]}".lstrip(".")
        tensors[copy_key(path, entry, adapted=path in sites)] = full_tensor(state[key])
    if is_scaled:  # plain reflections
        config = dataclasses.replace(config, apply_GS=False)
    return _inference_config(root, config), {key: tensor.detach() for key, tensor in tensors.items()}, row


def _inference_config(root: nn.Module, config: HRAConfig) -> HRAConfig:
    """The configuration as PEFT writes it: for inference, with explicit targets and the name of the base model."""
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        resolved = resolve_targets(root, config)
        # A regular expression cannot be combined with layer indices.
        targets = targets if isinstance(resolved, str) and config.layers_to_transform is not None else resolved
    return dataclasses.replace(
        config,
        inference_mode=True,
        target_modules=targets,
        base_model_name_or_path=base_model_name(root, config),
        auto_mapping=auto_mapping(root, config),
    )
