"""Plan the files that a fold writes for one folder of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import CONFIG, Architecture
from hra_fx.checkpoint.disk.columns import Columns
from hra_fx.checkpoint.disk.edit_types import FilePlan, Item, Replacement, Rotation
from hra_fx.checkpoint.disk.header import Header, NewTensor, StoredTensor, dtype_name, extended
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.checkpoint.disk.plan_edits import Edits, edits_for, touches
from hra_fx.checkpoint.disk.ties import FLAG
from hra_fx.checkpoint.disk.weight_files import WeightSet, foreign, weight_sets
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError


@dataclass(frozen=True)
class FolderPlan:
    """New files of a folder; other files are copied.

    Attributes:
        files: name -> planned safetensors file.
        texts: name -> content of a text file.
        rotated: names of rotated tensors.
        given: names of tensors from the adapter.
        untied: names of new tensors -> names of the tensors they were tied to.
        unfolded: files with weights that are copied unchanged.
        retied_by: see `Untying.retied_by`.
    """

    files: dict[str, FilePlan]
    texts: dict[str, bytes]
    rotated: tuple[str, ...]
    given: tuple[str, ...]
    untied: dict[str, str]
    unfolded: tuple[Path, ...]
    retied_by: tuple[str, ...]


def plan_folder(folder: Path, adapters: Sequence[AdapterFiles], columns: Collection[str] | None) -> FolderPlan:
    """Plan the fold of adapters, in order, into the checkpoint of a folder.

    Raises:
        CheckpointError: there is no checkpoint, or an adapter does not fit it.
        FoldError: tied weights cannot be untied.
    """
    if (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: there is an adapter in the base model's folder, and from_pretrained would load "
            "it on top of the folded weights. Move it to another folder."
        )
    sets = weight_sets(folder)
    architecture = Architecture(folder)
    layout = Columns(architecture, columns)
    named = [(found, Names(found.name, found.tensors.keys(), lambda: architecture.prefix)) for found in sets]
    # If no set has any layer, the first one reports what is missing.
    folded = [pair for pair in named if touches(pair[0], adapters, pair[1])] or named[:1]
    plan = FolderPlan({}, {}, (), (), {}, (), ())
    for found, names in folded:
        edits = edits_for(found, adapters, architecture, names, layout)
        plan = _joined(plan, _plan_set(found, edits, architecture))
    taken = {header.file for found, _ in folded for header in found.files}
    others = [header.file for found in sets for header in found.files if header.file not in taken]
    return _joined(plan, FolderPlan({}, {}, (), (), {}, (*others, *sorted(foreign(folder))), ()))


def _joined(one: FolderPlan, other: FolderPlan) -> FolderPlan:
    return FolderPlan(
        one.files | other.files,
        one.texts | other.texts,
        tuple(dict.fromkeys(one.rotated + other.rotated)),
        tuple(dict.fromkeys(one.given + other.given)),
        one.untied | other.untied,
        one.unfolded + other.unfolded,
        tuple(dict.fromkeys(one.retied_by + other.retied_by)),
    )


def _plan_set(found: WeightSet, edits: Edits, architecture: Architecture) -> FolderPlan:
    added = [_added(name, *made) for name, made in edits.added.items()]
    last = found.files[-1]
    files = [_plan_file(header, edits, added if header is last else []) for header in found.files]
    texts: dict[str, bytes] = {}
    if added and found.index is not None:
        texts[found.index.name] = _index(found, added, last.file.name)
    if edits.configs:
        texts[CONFIG] = _config(architecture, edits.configs)
    done = {name: edits.tensors.get(name) for name in found.tensors}
    done |= {name: edit for name, (_, edit) in edits.added.items()}
    return FolderPlan(
        {file.name: file for file in files},
        texts,
        tuple(name for name, edit in done.items() if isinstance(edit, Rotation)),
        tuple(name for name, edit in done.items() if isinstance(edit, Replacement)),
        edits.untied,
        (),
        edits.retied_by,
    )


def _added(name: str, source: StoredTensor | None, edit: Any) -> NewTensor:
    if source is not None:
        return NewTensor(name, source.dtype, source.shape, source.size)
    tensor = edit.tensor
    kind = dtype_name(tensor.dtype)
    if kind is None:
        raise CheckpointError(f"{name}: unsupported dtype {tensor.dtype} in the adapter. Save it in another dtype.")
    return NewTensor(name, kind, tuple(tensor.shape), tensor.numel() * tensor.itemsize)


def _plan_file(header: Header, edits: Edits, added: Sequence[NewTensor]) -> FilePlan:
    head, order = extended(header, added)
    items = []
    for tensor in order:
        if isinstance(tensor, StoredTensor):
            source, edit = tensor, edits.tensors.get(tensor.name)
        else:
            source, edit = edits.added[tensor.name]  # type: ignore[assignment]
        items.append(Item(tensor.name, tensor.shape, tensor.size, source, edit))
    return FilePlan(header.file.name, head, tuple(items))


def _index(found: WeightSet, added: Sequence[NewTensor], file: str) -> bytes:
    """The index as transformers writes it, with new tensors in the last file; totals that are not numbers are kept."""
    entries: dict[str, Any] = dict(found.index_entries or {})
    entries["weight_map"] = {**entries["weight_map"], **{tensor.name: file for tensor in added}}
    if isinstance(entries.get("metadata"), dict):
        metadata = entries["metadata"] = dict(entries["metadata"])
        more = {
            "total_size": sum(tensor.size for tensor in added),
            "total_parameters": sum(math.prod(tensor.shape) for tensor in added),
        }
        for name, number in more.items():
            if type(metadata.get(name)) in (int, float):
                metadata[name] += number
    return (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode()


def _config(architecture: Architecture, paths: Sequence[tuple[str, ...]]) -> bytes:
    """`config.json` with tied embeddings off."""
    entries: dict[str, Any] = json.loads(json.dumps(architecture.entries))
    for path in paths:
        place = entries
        for key in path:
            place = place.setdefault(key, {})
        place[FLAG] = False
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
