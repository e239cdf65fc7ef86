"""What adapters change in one set of weight files: rotations and replacements; all names and shapes are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.columns import in_columns
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.header import DTYPES, FLOATS, StoredTensor
from hra_fx.checkpoint.disk.requests import (
    LayerChain,
    check_complete,
    check_embeddings,
    check_given,
    is_new,
    requests_of,
    unknown_tensor,
)
from hra_fx.checkpoint.disk.ties import Untying, is_in_block, untying
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError


@dataclass(frozen=True)
class Rotation:
    """`W -> W Q`.

    Attributes:
        chain: `U: (d, k)` of `Q`; of a tensor with all experts, `(experts, d, k)`.
        columns: whether the weight is `(in, out)`.
    """

    chain: Tensor
    columns: bool

    def matrices(self, stored: StoredTensor) -> Iterator[tuple[StoredTensor, Rotation]]:
        """The weight itself, or that of each expert in it, with its rotation."""
        if self.chain.dim() == 2:
            yield stored, self
            return
        size = stored.size // len(self.chain)
        for i, chain in enumerate(self.chain):
            start = stored.start + i * size
            one = dataclasses.replace(stored, shape=stored.shape[1:], start=start, size=size)
            yield one, dataclasses.replace(self, chain=chain)


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


def edits_for(
    found: WeightSet,
    adapters: Sequence[AdapterFiles],
    architecture: Architecture,
    names: FileNames,
    columns: Collection[str] | None,
) -> Edits:
    """What adapters, applied in order, change in a set of files.

    Raises:
        CheckpointError: an adapter does not fit; the message names the key.
        FoldError: tied weights cannot be untied.
    """
    chains, full = requests_of(adapters, found, names)
    changed: dict[str, Tensor | None] = {**dict.fromkeys(chains), **full}
    tied = {
        name: value
        for name, value in changed.items()
        if name not in found.tensors or not is_in_block(name) or architecture.ties_in_blocks
    }

    def edit_of(name: str, stored: StoredTensor) -> Edit:
        if name in full:
            return full[name].to(check_given(name, full[name], stored)).contiguous()
        return rotation_of(stored, chains[name], architecture, columns)

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
            if not is_new(name, adapters):
                raise unknown_tensor(name, found, adapters, names)
            if (renamed := names.renamed(name)) is None:
                edits.added.append(_new(name, full[name], found))
            else:
                edits.tensors[renamed.name] = edit_of(name, renamed)
    check_embeddings(
        found, adapters, names, lambda name: found.tensors.get(names.find(name) or apart.sources.get(name, ""))
    )
    for adapter in adapters:
        check_complete(found, adapter, architecture, names)
    return edits


def rotation_of(
    stored: StoredTensor,
    chains: Sequence[LayerChain],
    architecture: Architecture,
    columns: Collection[str] | None,
) -> Rotation:
    """The rotation of a weight by the chains of some adapters, in order.

    Args:
        stored: the weight.
        chains: what each adapter does to it.
        architecture: of the checkpoint.
        columns: see `in_columns`.

    Raises:
        CheckpointError: the weight is quantized, or a chain does not fit it.
    """
    if stored.dtype not in FLOATS or len(stored.shape) < 2 or not stored.size:
        raise CheckpointError(
            f"{stored.file}: {stored.name} must be {', '.join(FLOATS)} with at least two dimensions, got "
            f"{stored.dtype} of shape {stored.shape}. Use a base model that is not quantized."
        )
    layouts = [in_columns(chain, stored, architecture, columns) for chain in chains]
    vectors = [chain.vectors for chain in chains]
    return Rotation(torch.cat(vectors, dim=-1) if len(vectors) > 1 else vectors[0], layouts[0])


def _new(name: str, tensor: Tensor, found: WeightSet) -> Item:
    """A tensor that the base does not have, such as a new classification head."""
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
