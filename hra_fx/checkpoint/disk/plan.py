"""Plan everything that a call writes, for all parts of a checkpoint, before anything is written.

All names and shapes are checked. A change is a rotation, a replacement, or a new tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.disk.architecture import CONFIG, Architecture, Source
from hra_fx.checkpoint.disk.file_names import FileNames, Untying, untied_config, untying
from hra_fx.checkpoint.disk.requests import (
    LayerChain,
    check_base,
    check_complete,
    check_embeddings,
    check_given,
    is_new,
    requests_of,
    touches,
    unknown_tensor,
)
from hra_fx.checkpoint.disk.stored import FLOATS, Header, Rotation, StoredTensor, WeightSet, foreign, weight_sets
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import is_conv1d

#: The change of a tensor: another tensor of the base model, a rotation, or a new value in the checkpoint's dtype.
Change: TypeAlias = StoredTensor | tuple[StoredTensor, Rotation] | Tensor


def changes_for(
    adapters: Sequence[Adapter], names: FileNames, columns: Collection[str] | None
) -> tuple[dict[str, Change], Untying]:
    """Compute the changes that adapters, applied in order, make in a set of files.

    Returns name of an old or a new tensor -> its change; and the tensors to untie.
    """
    found, (chains, full) = names.found, requests_of(adapters, names)
    changed: dict[str, Tensor | None] = {**dict.fromkeys(chains), **full}

    def change_of(name: str, stored: StoredTensor) -> Change:
        if name in full:
            return full[name].to(check_given(name, full[name], stored)).contiguous()
        return stored, rotation_of(stored, chains[name], names.architecture, columns)

    apart = untying(names, changed)
    changes: dict[str, Change] = {}
    for new, name in apart.sources.items():
        stored = found.tensors[name]
        changes[new] = change_of(apart.changed[new], stored) if new in apart.changed else stored
    for name in changed:
        if name in found.tensors:
            changes[name] = change_of(name, found.tensors[name])
        elif name not in apart.changed.values() and name not in apart.stay_tied:
            if not is_new(name, adapters) or names.is_converted(name):
                raise unknown_tensor(name, adapters, names)
            changes[name] = _new(full[name], found)
    check_embeddings(adapters, names)
    for adapter in adapters:
        check_complete(adapter, names)
    return changes, apart


def rotation_of(
    stored: StoredTensor,
    chains: Sequence[LayerChain],
    architecture: Architecture,
    columns: Collection[str] | None,
) -> Rotation:
    """The rotation of a weight by the chains of adapters, in order; for `columns`, see `fold_checkpoint`."""
    if stored.dtype not in FLOATS or len(stored.shape) < 2 or not math.prod(stored.shape):
        raise CheckpointError(
            f"{stored.file}: {stored.name} must be {', '.join(FLOATS)} with at least two dimensions, got "
            f"{stored.dtype} of shape {stored.shape}. Use a base model that is not quantized."
        )
    layouts = [_in_columns(chain, stored, architecture, columns) for chain in chains]
    return Rotation(torch.cat([chain.vectors for chain in chains], dim=-1), layouts[0])


def _new(tensor: Tensor, found: WeightSet) -> Tensor:
    """Cast a tensor that is not in the base model, such as a new head, to the dtype of the largest weight."""
    weights = [stored for stored in found.tensors.values() if stored.dtype in FLOATS]
    dtype = FLOATS[max(weights, key=lambda stored: stored.size).dtype]
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _in_columns(
    chain: LayerChain, weight: StoredTensor, architecture: Architecture, given: Collection[str] | None
) -> bool:
    """Whether a layer's weight is `(in, out)`.

    `given` is the user's list of such layers, as ends of paths; `None` to use `config.json`.
    """
    d = chain.vectors.shape[-2]
    rows, *others = weight.shape[chain.vectors.dim() - 2 :]
    width = math.prod(others)
    known = _known(chain, architecture, given) if len(others) == 1 else False
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


def _known(chain: LayerChain, architecture: Architecture, given: Collection[str] | None) -> bool | None:
    """The layout according to `config.json`, otherwise to the user; `None` if unknown."""
    path, by_config = chain.path, chain.columns
    if chain.vectors.dim() == 3 or by_config is not None:
        path = parameter_of(path)
    else:
        layer = None if architecture.in_rows else architecture.find(path)
        by_config = False if architecture.in_rows else None if layer is None else is_conv1d(layer)
    if given is None or by_config is not None:
        return by_config
    return any(path == name or path.endswith(f".{name}") for name in given)


@dataclass(frozen=True)
class FilePlan:
    """A planned file: the prefix of its path in the new folder, the header of the base file, and the new values."""

    part: str
    header: Header
    tensors: Mapping[str, Change]


@dataclass
class Plan:
    """The planned result. Paths and names of tensors start with the name of their part of the pipeline.

    Attributes:
        files: path in the new folder -> changed weights, or a new text; other files are copied.
        untied: name of a new tensor -> name of the tensor that it was tied to.
        kept: files with weights of the base model that are copied unchanged.
        retied_by: see `Untying.retied_by`.
    """

    files: dict[str, FilePlan | bytes] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    retied_by: list[str] = field(default_factory=list)


def plan_fold(
    base: Path, adapters: Mapping[str, Sequence[Adapter]], columns: Collection[str] | None, given: Source
) -> Plan:
    """Plan a fold of the adapters of each folder in the base, in order. `given` is the base as the user named it."""
    plan = Plan()
    for part, own in adapters.items():
        _plan_part(plan, f"{part}/" if part else "", base / part, own, columns, Path(given) / part)
    return plan


def _plan_part(
    plan: Plan, part: str, folder: Path, adapters: Sequence[Adapter], columns: Collection[str] | None, given: Path
) -> None:
    """Add the fold of adapters, in order, into the checkpoint of a folder to the plan."""
    if (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: there is an adapter in the base model's folder, and from_pretrained would load "
            "it on top of the folded weights. Move it to another folder."
        )
    sets = weight_sets(folder)
    architecture = Architecture(folder)
    named = [FileNames(found, architecture) for found in sets]
    # If no set has any layer, the first set reports what is missing.
    folded = [names for names in named if touches(adapters, names)] or named[:1]
    for names in folded:
        check_base(adapters, names, given)
        changes, apart = changes_for(adapters, names, columns)
        _plan_set(plan, part, names.found, changes)
        if apart.configs:
            plan.files[part + CONFIG] = untied_config(architecture, apart.configs)
        plan.untied |= {part + new: part + source for new, source in apart.sources.items()}
        plan.retied_by += apart.retied_by
    taken = {header.file for names in folded for header in names.found.files}
    plan.kept += [header.file for found in sets for header in found.files if header.file not in taken]
    plan.kept += sorted(foreign(folder))


def _plan_set(plan: Plan, part: str, found: WeightSet, changes: Mapping[str, Change]) -> None:
    added = {name: change for name, change in changes.items() if name not in found.tensors}
    last = found.files[-1]
    for header in found.files:
        own = {name: changes[name] for name in header.tensors if name in changes} | (added if header is last else {})
        if own:
            plan.files[part + header.file.name] = FilePlan(part, header, {**header.tensors, **own})
    if added and found.index is not None:
        plan.files[part + found.index.name] = _index(found, added, last.file.name)


def _index(found: WeightSet, added: Mapping[str, Change], file: str) -> bytes:
    """The index in transformers' format, with new tensors in the last file. Totals that are not numbers are kept."""
    entries: dict[str, Any] = dict(found.index_entries or {})
    entries["weight_map"] = {**entries["weight_map"], **dict.fromkeys(added, file)}
    if isinstance(entries.get("metadata"), dict):
        metadata = entries["metadata"] = dict(entries["metadata"])
        for change in added.values():
            new = change[0] if isinstance(change, tuple) else change
            size = new.nbytes if isinstance(new, Tensor) else new.size
            for total, number in {"total_size": size, "total_parameters": math.prod(new.shape)}.items():
                if isinstance(metadata.get(total), int | float):
                    metadata[total] += number
    return (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode()
