"""What adapters change in one set of weight files: rotations and replacements; all names and shapes are checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.columns import in_columns
from hra_fx.checkpoint.disk.header import DTYPES, FLOATS, StoredTensor
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.checkpoint.disk.streams import as_bytes, read_into
from hra_fx.checkpoint.disk.ties import Untying, is_in_block, untying
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.selection.select import is_target

_WEIGHTS = ("weight", "in_proj_weight")
_IN_MEMORY = "Fold it in memory: hra_fx.load_adapter, then hra_fx.fold"


@dataclass(frozen=True)
class Rotation:
    """`W -> W Q`.

    Attributes:
        chain: `U: (d, k)` of `Q`, float64.
        columns: whether the weight is `(in, out)`.
    """

    chain: Tensor
    columns: bool


#: A rotation, or a new value in the checkpoint's dtype.
Edit: TypeAlias = Rotation | Tensor


@dataclass(frozen=True)
class Item:
    """A tensor of a planned file.

    Attributes:
        name: its key.
        dtype: its name in the format, such as "BF16".
        shape: its shape.
        size: its size in bytes.
        source: the tensor of the base; `None` for a new tensor.
        edit: the change; `None` for a copy.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    source: StoredTensor | None
    edit: Edit | None


def stored_item(stored: StoredTensor, edit: Edit | None = None, name: str | None = None) -> Item:
    """A tensor of the base, changed or not, under its own name or another one."""
    return Item(name or stored.name, stored.dtype, stored.shape, stored.size, stored, edit)


@dataclass
class Edits:
    """Changes of a set of files.

    Attributes:
        apart: what is untied.
        tensors: key -> its change.
        added: new tensors.
    """

    apart: Untying
    tensors: dict[str, Edit] = field(default_factory=dict)
    added: list[Item] = field(default_factory=list)


def touches(adapters: Iterable[AdapterFiles], names: Names) -> bool:
    """Whether a set of files has any layer of any adapter."""
    return any(_weight(names, path) for adapter in adapters for path in adapter.chains)


def edits_for(
    found: WeightSet,
    adapters: Sequence[AdapterFiles],
    architecture: Architecture,
    names: Names,
    columns: Collection[str] | None,
) -> Edits:
    """What adapters, applied in order, change in a set of files.

    Raises:
        CheckpointError: an adapter does not fit; the message names the key.
        FoldError: tied weights cannot be untied.
    """
    chains, full = _requested(adapters, names)
    _check_requested(found, chains, full)
    changed: dict[str, Tensor | None] = {**dict.fromkeys(chains), **full}
    tied = {
        name: value
        for name, value in changed.items()
        if name not in found.tensors or not is_in_block(name) or architecture.ties_in_blocks
    }

    def edit_of(name: str, stored: StoredTensor) -> Edit:
        if name in full:
            return _given(name, full[name], stored)
        return _rotation(stored, chains[name], architecture, columns)

    apart = untying(architecture, names, tied) if tied else Untying()
    edits = Edits(apart)
    for new, name in apart.sources.items():
        called, source = apart.changed.get(new), found.tensors[name]
        edit = None if called is None else edit_of(called, source)
        edits.added.append(stored_item(source, edit, new))
    for name in changed:
        if name in found.tensors:
            edits.tensors[name] = edit_of(name, found.tensors[name])
        elif name not in apart.changed.values() and name not in apart.stay_tied:
            edits.added.append(_new(name, found, adapters, names))
    _check_embeddings(found, adapters, names, apart)
    for adapter in adapters:
        _check_complete(found, adapter, architecture, names)
    return edits


def _requested(
    adapters: Iterable[AdapterFiles], names: Names
) -> tuple[dict[str, list[tuple[str, Tensor]]], dict[str, Tensor]]:
    """Rotations and new values, by the name in the file, or in the adapter if the file does not have it."""
    chains: dict[str, list[tuple[str, Tensor]]] = {}
    full: dict[str, Tensor] = {}
    for adapter in adapters:
        for path, chain in adapter.chains.items():
            chains.setdefault(_weight(names, path) or f"{path}.weight", []).append((path, chain))
        for given, tensor in adapter.full.items():
            name = names.find(given) or given
            if name in full:
                raise CheckpointError(
                    f"{adapter.file}: {given} is trained by this adapter and by an earlier one (modules_to_save or "
                    "bias), and only one can replace it. Leave out one of them."
                )
            full[name] = tensor
    return chains, full


def _weight(names: Names, path: str) -> str | None:
    return names.find(*(f"{path}.{weight}" for weight in _WEIGHTS))


def _check_requested(found: WeightSet, chains: Collection[str], full: Collection[str]) -> None:
    for name in (*chains, *full):
        if name in chains and name in full:
            raise CheckpointError(
                f"{found.name}: one adapter rotates {name}, and another one replaces it (modules_to_save). Leave out "
                "one of them."
            )
        also = [alias for alias, kept in found.aliases.items() if name in (alias, kept)]
        if also:
            raise CheckpointError(
                f"{found.name}: {found.aliases[also[0]]} and {', '.join(also)} share one tensor, and the file does not "
                f"say whether they are one layer. {_IN_MEMORY}."
            )


def _rotation(
    stored: StoredTensor,
    chains: Sequence[tuple[str, Tensor]],
    architecture: Architecture,
    columns: Collection[str] | None,
) -> Rotation:
    if stored.dtype not in FLOATS or len(stored.shape) < 2 or not stored.size:
        raise CheckpointError(
            f"{stored.file}: {stored.name} must be {', '.join(FLOATS)} with at least two dimensions, got "
            f"{stored.dtype} of shape {stored.shape}. Use a base model that is not quantized."
        )
    layouts = [in_columns(path, stored, chain.shape[0], architecture, columns) for path, chain in chains]
    chain = chains[0][1]
    return Rotation(torch.cat([each for _, each in chains], dim=1) if len(chains) > 1 else chain, layouts[0])


def _given(name: str, tensor: Tensor, stored: StoredTensor) -> Tensor:
    dtype = DTYPES.get(stored.dtype)
    if tuple(tensor.shape) != stored.shape or dtype is None or dtype.is_floating_point != tensor.is_floating_point():
        raise CheckpointError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {stored.shape}, but the adapter's {name} is "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}. Was it trained on another base model?"
        )
    return tensor.to(dtype).contiguous()


def _new(name: str, found: WeightSet, adapters: Iterable[AdapterFiles], names: Names) -> Item:
    """A tensor that the base does not have, such as a new classification head."""
    path = name.rpartition(".")[0]
    adapter = next(a for a in adapters if name in a.full or any(_names(name, p) for p in a.chains))
    if name not in adapter.full or not adapter.saves(path):
        raise CheckpointError(
            f"{adapter.file}: the adapter changes {name}, which is not in {found.name}. {names.near(name)} Was it "
            f"trained on another base model, or on one that transformers loads under other names? {_IN_MEMORY}."
        )
    tensor = adapter.full[name]
    sizes = dict.fromkeys(FLOATS, 0)
    for stored in found.tensors.values():
        if stored.dtype in sizes:
            sizes[stored.dtype] += stored.size
    dtype = FLOATS[max(sizes, key=lambda kind: sizes[kind])]
    tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    kind = next((known for known, dtype in DTYPES.items() if dtype is tensor.dtype), None)
    if kind is None:
        raise CheckpointError(f"{name}: unsupported dtype {tensor.dtype} in the adapter. Save it in another dtype.")
    return Item(name, kind, tuple(tensor.shape), tensor.numel() * tensor.itemsize, None, tensor)


def _names(name: str, path: str) -> bool:
    return name in [f"{path}.{weight}" for weight in _WEIGHTS]


def _check_embeddings(found: WeightSet, adapters: Iterable[AdapterFiles], names: Names, apart: Untying) -> None:
    """PEFT saves the base model's embeddings with adapters of output layers: they must match this base."""
    for adapter in adapters:
        for name, tensor in adapter.embeddings.items():
            key = names.find(name) or apart.sources.get(name)
            if key is None:
                raise CheckpointError(
                    f"{adapter.file}: unexpected key {name}, which is neither in modules_to_save nor in {found.name}. "
                    f"{names.near(name)} Was the adapter trained on another base model?"
                )
            if not _holds(found.tensors[key], tensor):
                raise CheckpointError(
                    f"{adapter.file}: {name} of shape {tuple(tensor.shape)} is a copy of the base model's embeddings, "
                    f"but {key} of shape {found.tensors[key].shape} in {found.tensors[key].file} has other values. Use "
                    "the base model that the adapter was trained on."
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


def _check_complete(found: WeightSet, adapter: AdapterFiles, architecture: Architecture, names: Names) -> None:
    """Check that every target layer that the model loads has vectors."""
    keys = {_weight(names, path): path for path in adapter.chains}
    renamed = next(((key, path) for key, path in keys.items() if key and not key.startswith(f"{path}.")), None)
    prefix = architecture.prefix if renamed else ""
    stripped = bool(renamed and renamed[1].startswith(prefix))
    for key, stored in found.tensors.items():
        path, _, last = key.rpartition(".")
        theirs = f"{prefix}{path}" if stripped else path.removeprefix(prefix)
        if key in keys or last not in _WEIGHTS or len(stored.shape) < 2 or not is_target(adapter.config, theirs):
            continue
        # Files may have layers that the model does not load, such as heads for multi-token prediction.
        if architecture.model is None or architecture.find(path) is not None:
            raise CheckpointError(
                f"{adapter.file}: there are no vectors for {theirs}, which the configuration names. Was the adapter "
                f"trained on another base model than {found.name}, or its configuration edited?"
            )
