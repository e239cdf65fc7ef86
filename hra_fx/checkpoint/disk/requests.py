"""The changes that adapters make in one set of weight files, by the names in the files. All changes are checked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.base_model import compare_names, is_same, other_embeddings
from hra_fx.checkpoint.disk.architecture import IN_MEMORY, Source
from hra_fx.checkpoint.disk.file_names import WEIGHTS, FileNames, TensorRef
from hra_fx.checkpoint.disk.stored import DTYPES, FLOATS, StoredTensor, WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of, stands_for_parameter
from hra_fx.selection.parameters import matches_parameter
from hra_fx.selection.select import is_target


class LayerChain(NamedTuple):
    """The chain of one adapter for a tensor: `U: (d, k)`, or `(experts, d, k)` for a tensor with all experts.

    For `columns`, see `TensorRef`.
    """

    path: str
    vectors: Tensor
    columns: bool | None = None


class Renaming(NamedTuple):
    """The prefix by which module names differ: the adapter has `add`, and the file has `remove`."""

    add: str = ""
    remove: str = ""

    def to_adapter(self, path: str) -> str:
        """The adapter's name of a module."""
        return f"{self.add}{path.removeprefix(self.remove)}"


def touches(adapters: Iterable[Adapter], names: FileNames) -> bool:
    """Whether a set of files has any layer of any adapter."""
    return any(names.weights_of(path) for adapter in adapters for path in adapter.chains)


def requests_of(adapters: Iterable[Adapter], names: FileNames) -> tuple[dict[str, list[LayerChain]], dict[str, Tensor]]:
    """Collect the changes that adapters, applied in order, make in a set of files.

    Returns name of a weight -> the chain of each adapter, in order; and name of a tensor -> its new value. Names are
    those in the file, otherwise those of the adapter.
    """
    chains: dict[str, list[LayerChain]] = {}
    full: dict[str, Tensor] = {}
    for adapter in adapters:
        for path, chain in adapter.chains.items():
            refs = names.weights_of(path) or [TensorRef(_weight_name(path))]
            _check_experts(adapter, path, chain, names.found, refs)
            for name, expert, columns in refs:
                own = chain if expert is None else chain[expert]
                chains.setdefault(name, []).append(LayerChain(path, own, columns))
        for given, tensor in adapter.full.items():
            name = names.find(given) or given
            if name in full:
                raise CheckpointError(
                    f"{adapter.file}: {given} is trained by this adapter and by an earlier one (modules_to_save or "
                    "bias), and only one can replace it. Leave out one of them."
                )
            full[name] = tensor
    _refuse_aliases(names.found, (*chains, *full))
    if both := chains.keys() & full.keys():
        raise CheckpointError(
            f"{names.found.name}: one adapter rotates {min(both)}, and another one replaces it (modules_to_save). "
            "Leave out one of them."
        )
    return chains, full


def _weight_name(path: str) -> str:
    """The name of a layer's weight in most files."""
    return parameter_of(path) if stands_for_parameter(path) else f"{path}.weight"


def _check_experts(adapter: Adapter, path: str, chain: Tensor, found: WeightSet, refs: Collection[TensorRef]) -> None:
    for name, expert, _ in refs:
        stored = found.tensors.get(name)
        if chain.dim() == 3 and stored is not None:
            count = stored.shape[0] if expert is None else 1 + max(each.expert or 0 for each in refs)
            if count != chain.shape[0] or len(stored.shape) != 3 - (expert is not None):
                raise CheckpointError(
                    f"{stored.file}: {parameter_of(path)} has {count} experts ({name} has shape {stored.shape}), but "
                    f"the adapter's vectors of {path} have {chain.shape[0]}. Was {adapter.file} trained on another "
                    "base model?"
                )


def _refuse_aliases(found: WeightSet, changed: Iterable[str]) -> None:
    """Refuse tensors that `safetensors.torch.save_model` stored once; its metadata has removed key -> kept key."""
    shared = {name for header in found.files for entry in header.metadata.items() for name in entry}
    if name := next((name for name in changed if name in shared), None):
        raise CheckpointError(
            f"{found.name}: {name} shares its tensor with another one, and the file does not say whether they are one "
            f"layer. {IN_MEMORY}"
        )


def renaming_of(adapter: Adapter, names: FileNames) -> Renaming:
    """Find the prefix by which module names in an adapter differ from those in a set of files."""
    for path in adapter.chains:
        refs = names.weights_of(path)
        name = names.loaded.get(refs[0].name, refs[0].name) if refs else f"{path}."
        if not name.startswith(f"{path}."):
            prefix = names.architecture.prefix
            if name.startswith(prefix) is path.startswith(prefix) and stands_for_parameter(path):
                continue  # experts have other names in the file
            return Renaming(add=prefix) if path.startswith(prefix) else Renaming(remove=prefix)
    return Renaming()


def unknown_tensor(name: str, adapters: Iterable[Adapter], names: FileNames) -> CheckpointError:
    """The error for a tensor that an adapter changes but a set of files does not have."""
    adapter = next(a for a in adapters if name in a.full or any(name == _weight_name(path) for path in a.chains))
    return CheckpointError(
        f"{adapter.file}: the adapter changes {name}, which is not in {names.found.name}. Was it "
        f"trained on another base model, or on one that transformers loads under other names? {IN_MEMORY}"
    )


def is_new(name: str, adapters: Iterable[Adapter]) -> bool:
    """Whether a tensor that is not in a set of files may be new: it is in `modules_to_save`, such as a new head."""
    return any(name in adapter.full and adapter.saves(name.rpartition(".")[0]) for adapter in adapters)


def check_given(name: str, tensor: Tensor, stored: StoredTensor) -> torch.dtype:
    """Check that a new value fits the tensor that it replaces. Returns the dtype of that tensor."""
    dtype = DTYPES.get(stored.dtype)
    if tuple(tensor.shape) != stored.shape or dtype is None or dtype.is_floating_point != tensor.is_floating_point():
        raise CheckpointError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {stored.shape}, but the adapter's {name} is "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}. Was it trained on another base model?"
        )
    return dtype


def check_embeddings(adapters: Iterable[Adapter], names: FileNames) -> None:
    """Check that embeddings, which PEFT saves with adapters on output layers, equal those of this base model."""
    for adapter in adapters:
        for name, tensor in adapter.embeddings.items():
            own = names.stored(name)
            if own is None:
                raise CheckpointError(
                    f"{adapter.file}: unexpected key {name}, which is not in modules_to_save or in {names.found.name}. "
                    "Was the adapter trained on another base model?"
                )
            if own.dtype not in DTYPES or own.shape != tuple(tensor.shape) or not is_same(own.read(), tensor):
                place = f"{own.name} of shape {own.shape} in {own.file}"
                raise other_embeddings(adapter.file, name, tensor, place)


def check_complete(adapter: Adapter, names: FileNames) -> None:
    """Check that every target layer and parameter that the model loads has vectors."""
    keys = {place.name for path in adapter.chains for place in names.weights_of(path)}
    renaming, architecture = renaming_of(adapter, names), names.architecture
    for key, stored in names.found.tensors.items():
        path, _, last = names.loaded.get(key, key).rpartition(".")
        theirs = renaming.to_adapter(path)
        if key in keys or last not in WEIGHTS or len(stored.shape) < 2 or not is_target(adapter.config, theirs):
            continue
        # Files may contain layers that the model does not load, such as heads for multi-token prediction.
        if architecture.model is None or architecture.find(path) is not None:
            raise _incomplete(adapter, theirs, names.found)
    if adapter.config.target_parameters:
        own = {names.parameter(path) for path in adapter.chains}
        for parameter in names.stacked:
            if parameter not in own and matches_parameter(adapter.config.target_parameters, parameter):
                raise _incomplete(adapter, parameter, names.found)


def _incomplete(adapter: Adapter, name: str, found: WeightSet) -> CheckpointError:
    return CheckpointError(
        f"{adapter.file}: the file has no vectors for {name}, which the configuration names. Was the adapter trained "
        f"on another base model than {found.name}, or its configuration edited?"
    )


def check_base(adapters: Iterable[Adapter], names: FileNames, given: Source) -> None:
    """Check the model in a folder with the row of the base model that adapter files contain.

    Without a row, as in PEFT's files, the names of the models are compared. `given` is the folder as the user named it,
    because a symbolic link may have the name of the model.
    """
    folder = names.architecture.folder
    for adapter in adapters:
        row, state = adapter.base_row, "unknown"
        if row is not None and row.path in adapter.chains:
            state = row.state(adapter.chains[row.path], _first_row(names, row.path, len(row.values)))
            if state == "folded":
                raise row.folded_error(adapter.file, str(folder))
        if state == "unknown":
            compare_names(adapter.file, adapter.config, os.path.abspath(given))


def _first_row(names: FileNames, path: str, width: int) -> Tensor | None:
    for name, _, _ in names.weights_of(path):
        stored = names.found.tensors[name]
        if stored.dtype in FLOATS and math.prod(stored.shape[1:]) == width:
            return dataclasses.replace(stored, index=0).read().flatten()
    return None
