"""What adapters change in one set of weight files, by the names of the files; checked before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.header import DTYPES, StoredTensor
from hra_fx.checkpoint.disk.naming import IN_MEMORY, Names
from hra_fx.checkpoint.disk.streams import as_bytes, read_into
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.selection.select import is_target

_WEIGHTS = ("weight", "in_proj_weight")


class Requests(NamedTuple):
    """What adapters, applied in order, change. Names are those in the file, or the adapter's if it does not have them.

    Attributes:
        chains: name of a weight -> (layer, its chain) of each adapter, in order.
        full: name of a tensor -> its new value.
    """

    chains: dict[str, list[tuple[str, Tensor]]]
    full: dict[str, Tensor]


class Renaming(NamedTuple):
    """How an adapter names the modules of a file, which may have no prefix or another one.

    Attributes:
        add: a prefix that the adapter has and the file does not.
        remove: a prefix that the file has and the adapter does not.
    """

    add: str = ""
    remove: str = ""

    def to_adapter(self, path: str) -> str:
        """The adapter's name of a module.

        >>> Renaming(add="bert.").to_adapter("encoder"), Renaming(remove="bert.").to_adapter("bert.encoder")
        ('bert.encoder', 'encoder')
        """
        return f"{self.add}{path.removeprefix(self.remove)}"


def weight_of(names: Names, path: str) -> str | None:
    """Name of a layer's weight in a file."""
    return names.find(*(f"{path}.{weight}" for weight in _WEIGHTS))


def touches(adapters: Iterable[AdapterFiles], names: Names) -> bool:
    """Whether a set of files has any layer of any adapter."""
    return any(weight_of(names, path) for adapter in adapters for path in adapter.chains)


def requests_of(adapters: Iterable[AdapterFiles], found: WeightSet, names: Names) -> Requests:
    """What adapters, applied in order, change in a set of files.

    Raises:
        CheckpointError: two adapters exclude each other, or a tensor shares its memory with another one.
    """
    chains: dict[str, list[tuple[str, Tensor]]] = {}
    full: dict[str, Tensor] = {}
    for adapter in adapters:
        for path, chain in adapter.chains.items():
            chains.setdefault(weight_of(names, path) or f"{path}.weight", []).append((path, chain))
        for given, tensor in adapter.full.items():
            name = names.find(given) or given
            if name in full:
                raise CheckpointError(
                    f"{adapter.file}: {given} is trained by this adapter and by an earlier one (modules_to_save or "
                    "bias), and only one can replace it. Leave out one of them."
                )
            full[name] = tensor
    _refuse_aliases(found, (*chains, *full))
    if both := chains.keys() & full.keys():
        raise CheckpointError(
            f"{found.name}: one adapter rotates {min(both)}, and another one replaces it (modules_to_save). Leave out "
            "one of them."
        )
    return Requests(chains, full)


def _refuse_aliases(found: WeightSet, changed: Iterable[str]) -> None:
    for name in changed:
        also = [alias for alias, kept in found.aliases.items() if name in (alias, kept)]
        if also:
            raise CheckpointError(
                f"{found.name}: {found.aliases[also[0]]} and {', '.join(also)} share one tensor, and the file does not "
                f"say whether they are one layer. {IN_MEMORY}"
            )


def renaming_of(adapter: AdapterFiles, names: Names, architecture: Architecture) -> Renaming:
    """How an adapter names the modules of a set of files."""
    for path in adapter.chains:
        key = weight_of(names, path)
        if key and not key.startswith(f"{path}."):
            prefix = architecture.prefix
            return Renaming(add=prefix) if path.startswith(prefix) else Renaming(remove=prefix)
    return Renaming()


def unknown_tensor(name: str, found: WeightSet, adapters: Iterable[AdapterFiles], names: Names) -> CheckpointError:
    """The error for a tensor that an adapter changes and a set of files does not have."""
    adapter = next(a for a in adapters if name in a.full or any(name == f"{path}.weight" for path in a.chains))
    return CheckpointError(
        f"{adapter.file}: the adapter changes {name}, which is not in {found.name}. {names.near(name)} Was it trained "
        f"on another base model, or on one that transformers loads under other names? {IN_MEMORY}"
    )


def is_new(name: str, adapters: Iterable[AdapterFiles]) -> bool:
    """Whether a tensor that a set of files does not have may be new: it is in `modules_to_save`, such as a new head."""
    return any(name in adapter.full and adapter.saves(name.rpartition(".")[0]) for adapter in adapters)


def check_given(name: str, tensor: Tensor, stored: StoredTensor) -> torch.dtype:
    """Check that a new value fits the tensor that it replaces; the dtype of that tensor.

    Raises:
        CheckpointError: it does not fit.
    """
    dtype = DTYPES.get(stored.dtype)
    if tuple(tensor.shape) != stored.shape or dtype is None or dtype.is_floating_point != tensor.is_floating_point():
        raise CheckpointError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {stored.shape}, but the adapter's {name} is "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}. Was it trained on another base model?"
        )
    return dtype


def check_embeddings(
    found: WeightSet, adapters: Iterable[AdapterFiles], names: Names, stored: Callable[[str], StoredTensor | None]
) -> None:
    """Check that the base model's embeddings, which PEFT saves with adapters of output layers, are those of this base.

    Args:
        found: the set of files.
        adapters: the adapters.
        names: names in the files.
        stored: finds a tensor in the files, or the one that it is tied to.

    Raises:
        CheckpointError: they are not, or a tensor is unknown.
    """
    for adapter in adapters:
        for name, tensor in adapter.embeddings.items():
            own = stored(name)
            if own is None:
                raise CheckpointError(
                    f"{adapter.file}: unexpected key {name}, which is neither in modules_to_save nor in {found.name}. "
                    f"{names.near(name)} Was the adapter trained on another base model?"
                )
            if not _holds(own, tensor):
                raise CheckpointError(
                    f"{adapter.file}: {name} of shape {tuple(tensor.shape)} is a copy of the base model's embeddings, "
                    f"but {own.name} of shape {own.shape} in {own.file} has other values. Use the base model that the "
                    "adapter was trained on."
                )


def _holds(stored: StoredTensor, tensor: Tensor) -> bool:
    """Whether the values are equal after rounding the wider dtype to the narrower."""
    if stored.shape != tuple(tensor.shape) or stored.dtype not in DTYPES:
        return False
    own = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    with open(stored.file, "rb", buffering=0) as stream:
        stream.seek(stored.start)
        read_into(stream, as_bytes(own.view(-1)), stored.file)
    return torch.equal(tensor.to(own.dtype), own) or torch.equal(own.to(tensor.dtype), tensor)


def check_complete(found: WeightSet, adapter: AdapterFiles, architecture: Architecture, names: Names) -> None:
    """Check that every target layer that the model loads has vectors.

    Raises:
        CheckpointError: one has none.
    """
    keys: Collection[str | None] = {weight_of(names, path) for path in adapter.chains}
    renaming = renaming_of(adapter, names, architecture)
    for key, stored in found.tensors.items():
        path, _, last = key.rpartition(".")
        theirs = renaming.to_adapter(path)
        if key in keys or last not in _WEIGHTS or len(stored.shape) < 2 or not is_target(adapter.config, theirs):
            continue
        # Files may have layers that the model does not load, such as heads for multi-token prediction.
        if architecture.model is None or architecture.find(path) is not None:
            raise CheckpointError(
                f"{adapter.file}: the file has no vectors for {theirs}, which the configuration names. Was the adapter "
                f"trained on another base model than {found.name}, or its configuration edited?"
            )
