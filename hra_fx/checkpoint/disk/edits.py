"""What adapters change in one set of weight files: rotations and replacements; all names and shapes are checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.columns import in_columns
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.requests import (
    LayerChain,
    check_complete,
    check_embeddings,
    check_given,
    is_new,
    requests_of,
    unknown_tensor,
)
from hra_fx.checkpoint.disk.rotation import Rotation
from hra_fx.checkpoint.disk.stored import DTYPES, FLOATS, StoredTensor
from hra_fx.checkpoint.disk.ties import Untying, untying
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError

#: A rotation, or a new value in the checkpoint's dtype.
Edit: TypeAlias = Rotation | Tensor


@dataclass
class Edits:
    """Changes of a set of files.

    Attributes:
        apart: what is untied.
        tensors: name -> its change, of old and new tensors.
        added: name of a new tensor -> the tensor of the base that it starts from; `None` if it is in an adapter.
    """

    apart: Untying
    tensors: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, StoredTensor | None] = field(default_factory=dict)


def edits_for(
    found: WeightSet,
    adapters: Sequence[Adapter],
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

    def edit_of(name: str, stored: StoredTensor) -> Edit:
        if name in full:
            return full[name].to(check_given(name, full[name], stored)).contiguous()
        return rotation_of(stored, chains[name], architecture, columns)

    apart = untying(architecture, names, changed)
    edits = Edits(apart)
    for new, name in apart.sources.items():
        edits.added[new] = found.tensors[name]
        if new in apart.changed:
            edits.tensors[new] = edit_of(apart.changed[new], found.tensors[name])
    for name in changed:
        if name in found.tensors:
            edits.tensors[name] = edit_of(name, found.tensors[name])
        elif name not in apart.changed.values() and name not in apart.stay_tied:
            if not is_new(name, adapters):
                raise unknown_tensor(name, found, adapters, names)
            names.check_new(name)
            edits.added[name], edits.tensors[name] = None, _new(name, full[name], found)
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
    if stored.dtype not in FLOATS or len(stored.shape) < 2 or not math.prod(stored.shape):
        raise CheckpointError(
            f"{stored.file}: {stored.name} must be {', '.join(FLOATS)} with at least two dimensions, got "
            f"{stored.dtype} of shape {stored.shape}. Use a base model that is not quantized."
        )
    layouts = [in_columns(chain, stored, architecture, columns) for chain in chains]
    vectors = [chain.vectors for chain in chains]
    return Rotation(torch.cat(vectors, dim=-1) if len(vectors) > 1 else vectors[0], layouts[0])


def _new(name: str, tensor: Tensor, found: WeightSet) -> Tensor:
    """A tensor that the base does not have, such as a new classification head, in the dtype of most weights."""
    sizes = dict.fromkeys(FLOATS, 0)
    for stored in found.tensors.values():
        if stored.dtype in sizes:
            sizes[stored.dtype] += stored.size
    dtype = FLOATS[max(sizes, key=lambda kind: sizes[kind])]
    tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"{name}: unsupported dtype {tensor.dtype} in the adapter. Save it in another dtype.")
    return tensor
