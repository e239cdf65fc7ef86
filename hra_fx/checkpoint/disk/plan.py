"""Plan everything that a call writes, for all parts of a checkpoint, before anything is written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.disk.architecture import CONFIG, Architecture
from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.edits import Edit, Edits, edits_for
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.requests import check_base, touches
from hra_fx.checkpoint.disk.rotation import Rotation
from hra_fx.checkpoint.disk.stored import Header, StoredTensor, WeightSet, foreign, weight_sets
from hra_fx.checkpoint.keys import reflection_key
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.model.untie import TIE_SETTING


@dataclass(frozen=True)
class FilePlan:
    """A planned file with weights.

    Attributes:
        part: the start of its path in the new folder.
        header: the header of the file that it replaces.
        tensors: name -> the tensor of the base, `None` for a new one.
        edits: name -> its change.
    """

    part: str
    header: Header
    tensors: Mapping[str, StoredTensor | None]
    edits: Mapping[str, Edit]


@dataclass
class Plan:
    """The planned result. Paths and names of tensors start with the part of the pipeline that they are in.

    Attributes:
        files: path in the new folder -> changed weights, or a new text; other files are copied.
        rotated: names of rotated tensors.
        given: names of tensors from an adapter.
        untied: names of new tensors -> names of the tensors they were tied to.
        kept: files of the base with weights that are copied unchanged.
        retied_by: see `Untying.retied_by`.
    """

    files: dict[str, FilePlan | bytes] = field(default_factory=dict)
    rotated: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    untied: dict[str, str] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    retied_by: list[str] = field(default_factory=list)


def plan_fold(request: Request, columns: Collection[str] | None, *, inverse: bool) -> Plan:
    """Plan every part.

    Args:
        request: the arguments.
        columns: see `fold_checkpoint`.
        inverse: whether to undo a fold.

    Raises:
        CheckpointError: there is no checkpoint, or an adapter does not fit it; or an adapter replaced values, which
            cannot be restored.
        FoldError: tied weights cannot be untied.
    """
    plan = Plan()
    for part, adapters in request.adapters.items():
        _plan_part(plan, f"{part}/" if part else "", request.base / part, adapters, columns, inverse=inverse)
    return plan


def _reversed(adapter: Adapter) -> Adapter:
    """`Q^T`: the same reflections in reverse order."""
    if adapter.full:
        raise CheckpointError(
            f"{adapter.file}: the adapter replaced {next(iter(adapter.full))} (modules_to_save or bias), whose old "
            "value is lost. Use the base checkpoint."
        )
    reversed_chains = {reflection_key(path): chain.flip(-1) for path, chain in adapter.chains.items()}
    config = dataclasses.replace(adapter.config, apply_GS=False)
    return dataclasses.replace(adapter, tensors={**adapter.tensors, **reversed_chains}, config=config)


def _plan_part(
    plan: Plan,
    part: str,
    folder: Path,
    adapters: Sequence[Adapter],
    columns: Collection[str] | None,
    *,
    inverse: bool,
) -> None:
    """Add the fold of adapters, in order, into the checkpoint of a folder; `inverse` if it undoes a fold."""
    if (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: there is an adapter in the base model's folder, and from_pretrained would load "
            "it on top of the folded weights. Move it to another folder."
        )
    sets = weight_sets(folder)
    architecture = Architecture(folder)
    named = [(found, FileNames(found, architecture)) for found in sets]
    # If no set has any layer, the first one reports what is missing.
    folded = [pair for pair in named if touches(adapters, pair[1])] or named[:1]
    for found, names in folded:
        check_base(adapters, folder, found, names, folded=inverse)
        ordered = [_reversed(adapter) for adapter in reversed(adapters)] if inverse else adapters
        _plan_set(plan, part, found, edits_for(found, ordered, architecture, names, columns), architecture)
    taken = {header.file for found, _ in folded for header in found.files}
    plan.kept += [header.file for found in sets for header in found.files if header.file not in taken]
    plan.kept += sorted(foreign(folder))


def _plan_set(plan: Plan, part: str, found: WeightSet, edits: Edits, architecture: Architecture) -> None:
    last = found.files[-1]
    for header in found.files:
        tensors: dict[str, StoredTensor | None] = {**header.tensors}
        if header is last:
            tensors |= edits.added
        own = {name: edits.tensors[name] for name in tensors if name in edits.tensors}
        if own or len(tensors) > len(header.tensors):
            plan.files[part + header.file.name] = FilePlan(part, header, tensors, own)
    if edits.added and found.index is not None:
        plan.files[part + found.index.name] = _index(found, edits, last.file.name)
    if edits.apart.configs:
        plan.files[part + CONFIG] = _config(architecture, edits.apart.configs)
    changes = [(name, edits.tensors.get(name)) for name in (*found.tensors, *edits.added)]
    plan.rotated += [part + name for name, edit in changes if isinstance(edit, Rotation)]
    plan.given += [part + name for name, edit in changes if isinstance(edit, Tensor)]
    plan.untied |= {part + new: part + source for new, source in edits.apart.sources.items()}
    plan.retied_by += edits.apart.retied_by


def _index(found: WeightSet, edits: Edits, file: str) -> bytes:
    """The index as transformers writes it, with new tensors in the last file; totals that are not numbers are kept."""
    entries: dict[str, Any] = dict(found.index_entries or {})
    entries["weight_map"] = {**entries["weight_map"], **dict.fromkeys(edits.added, file)}
    if isinstance(entries.get("metadata"), dict):
        metadata = entries["metadata"] = dict(entries["metadata"])
        for name, stored in edits.added.items():
            edit = edits.tensors.get(name)
            shape, size = (edit.shape, edit.nbytes) if isinstance(edit, Tensor) else _shape_of(stored)
            for total, number in {"total_size": size, "total_parameters": math.prod(shape)}.items():
                if type(metadata.get(total)) in (int, float):
                    metadata[total] += number
    return (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode()


def _shape_of(stored: StoredTensor | None) -> tuple[tuple[int, ...], int]:
    return ((), 0) if stored is None else (stored.shape, stored.size)


def _config(architecture: Architecture, paths: Sequence[tuple[str, ...]]) -> bytes:
    """`config.json` with tied embeddings off."""
    entries: dict[str, Any] = json.loads(json.dumps(architecture.entries))
    for path in paths:
        place = entries
        for key in path:
            place = place.setdefault(key, {})
        place[TIE_SETTING] = False
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
