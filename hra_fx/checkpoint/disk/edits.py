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
from hra_fx.checkpoint.disk.stored import DTYPES, FLOATS, StoredTensor, WeightSet
from hra_fx.checkpoint.disk.ties import Untying, untying
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import has_columns

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


def in_columns(
    chain: LayerChain, weight: StoredTensor, architecture: Architecture, given: Collection[str] | None
) -> bool:
    """Whether a layer's weight is `(in, out)`.

    Args:
        chain: what an adapter does to it.
        weight: the weight, `(out, ...)` or `(in, out)`; of all experts, with them in front.
        architecture: of the checkpoint.
        given: the user's list of such layers, ends of their paths; `None` to find out.

    Raises:
        CheckpointError: the length of the vectors does not fit, the layout is unknown, or the user contradicts
            `config.json`.
    """
    d = chain.vectors.shape[-2]
    rows, *others = weight.shape[chain.vectors.dim() - 2 :]
    width = math.prod(others)
    known = _known(chain, weight, architecture, given) if len(others) == 1 else False
    if known is None and rows == width == d:
        raise CheckpointError(
            f"{weight.file}: {weight.name} is square, {tuple(weight.shape)}, and the folder has no config.json of a "
            "transformers, diffusers or timm model, so the layout is ambiguous: (out, in), or (in, out) as in "
            "GPT-2. Pass columns=[] (--rows) if every weight is (out, in), or columns=[names] (--columns NAME) to "
            "name layers that are (in, out)."
        )
    columns = rows == d != width if known is None else known
    inputs = rows if columns else width
    if inputs != d:
        raise CheckpointError(
            f"{weight.file}: {weight.name} of shape {weight.shape} has {inputs} inputs, but the adapter's vectors "
            f"of {chain.path} have length {d}. Was the adapter trained on another base model?"
        )
    return columns


def _known(
    chain: LayerChain, weight: StoredTensor, architecture: Architecture, given: Collection[str] | None
) -> bool | None:
    """The layout according to `config.json` or the user; `None` if unknown."""
    path, by_config = chain.path, chain.columns
    if chain.vectors.dim() == 3 or by_config is not None:
        path = parameter_of(path)
    else:
        layer = None if architecture.in_rows else architecture.find(path)
        by_config = False if architecture.in_rows else None if layer is None else has_columns(layer)
    if given is None:
        return by_config
    said = any(path == name or path.endswith(f".{name}") for name in given)
    if by_config not in (None, said):
        kinds = ("(out, in)", "(in, out)")
        raise CheckpointError(
            f"{weight.file}: {weight.name} is {kinds[not said]} according to config.json, but {kinds[said]} "
            "according to columns (--columns, --rows). Omit columns, or correct config.json."
        )
    return said
