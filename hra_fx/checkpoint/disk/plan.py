"""Plan everything that a call writes, for all parts of a checkpoint, before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import CONFIG, Architecture
from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.base_check import check_base
from hra_fx.checkpoint.disk.edits import Edits, Item, Rotation, edits_for, stored_item
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.header import METADATA, Header, StoredTensor
from hra_fx.checkpoint.disk.requests import touches
from hra_fx.checkpoint.disk.weight_files import WeightSet, foreign, weight_sets
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.model.untie import TIE_SETTING

#: Increased when the written files change, so that an older unfinished result is not resumed.
_FORMAT = 2


@dataclass(frozen=True)
class FilePlan:
    """A planned file: a safetensors file, a new text (only `head`), or a copy of any file (one item).

    Attributes:
        head: the header.
        items: the tensors, in the order of the data.
    """

    head: bytes
    items: tuple[Item, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.head) + sum(item.size for item in self.items)


@dataclass
class Plan:
    """The planned result. Paths and names of tensors start with the part of the pipeline that they are in.

    Attributes:
        files: path in the new folder -> planned file.
        inputs: everything that the result depends on.
        rotated: names of rotated tensors.
        given: names of tensors from an adapter.
        untied: names of new tensors -> names of the tensors they were tied to.
        kept: files of the base with weights that are copied unchanged.
        retied_by: see `Untying.retied_by`.
    """

    files: dict[str, FilePlan] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    rotated: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    untied: dict[str, str] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    retied_by: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Size of all files in bytes."""
        return sum(file.size for file in self.files.values())


def plan_fold(request: Request, columns: Collection[str] | None, *, back: bool) -> Plan:
    """Plan every part.

    Args:
        request: the arguments.
        columns: see `fold_checkpoint`.
        back: whether to undo a fold.

    Raises:
        CheckpointError: there is no checkpoint, or an adapter does not fit it; or an adapter replaced values, which
            cannot be restored.
        FoldError: tied weights cannot be untied.
    """
    plan = Plan()
    for part, adapters in request.adapters.items():
        _plan_part(plan, f"{part}/" if part else "", request.base / part, adapters, columns, back=back)
    for path, file in request.files.items():
        if path not in plan.files:
            size = file.stat().st_size
            plan.files[path] = FilePlan(b"", (stored_item(StoredTensor(file, path, "U8", (size,), 0, size)),))
    heads = b"".join(plan.files[path].head for path in sorted(plan.files))
    plan.inputs = {
        "format": _FORMAT,
        "back": back,
        "base": str(request.base),
        "files": stamps(request.files),
        "folders": sorted(request.folders),
        "heads": hashlib.sha256(heads).hexdigest(),
        "adapters": {part: [adapter.digest for adapter in found] for part, found in request.adapters.items()},
        "columns": None if columns is None else sorted(columns),
    }
    return plan


def stamps(files: Mapping[str, Path]) -> dict[str, list[int]]:
    """Size and modification time of files."""
    return {path: [(found := file.stat()).st_size, found.st_mtime_ns] for path, file in files.items()}


def _reversed(adapter: AdapterFiles) -> AdapterFiles:
    """`Q^T`: the same reflections in reverse order."""
    if adapter.full:
        raise CheckpointError(
            f"{adapter.file}: the adapter replaced {next(iter(adapter.full))} (modules_to_save or bias), whose old "
            "value is lost. Use the base checkpoint."
        )
    return dataclasses.replace(adapter, chains={path: chain.flip(-1) for path, chain in adapter.chains.items()})


def _plan_part(
    plan: Plan,
    part: str,
    folder: Path,
    adapters: Sequence[AdapterFiles],
    columns: Collection[str] | None,
    *,
    back: bool,
) -> None:
    """Add the fold of adapters, in order, into the checkpoint of a folder; `back` if it undoes a fold."""
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
        check_base(adapters, folder, found, names, folded=back)
        ordered = [_reversed(adapter) for adapter in reversed(adapters)] if back else adapters
        _plan_set(plan, part, found, edits_for(found, ordered, architecture, names, columns), architecture)
    taken = {header.file for found, _ in folded for header in found.files}
    plan.kept += [header.file for found in sets for header in found.files if header.file not in taken]
    plan.kept += sorted(foreign(folder))


def _plan_set(plan: Plan, part: str, found: WeightSet, edits: Edits, architecture: Architecture) -> None:
    last = found.files[-1]
    for header in found.files:
        plan.files[part + header.file.name] = _plan_file(header, edits, edits.added if header is last else [])
    if edits.added and found.index is not None:
        plan.files[part + found.index.name] = FilePlan(_index(found, edits.added, last.file.name), ())
    if edits.apart.configs:
        plan.files[part + CONFIG] = FilePlan(_config(architecture, edits.apart.configs), ())
    done = [(name, edits.tensors.get(name)) for name in found.tensors] + [(new.name, new.edit) for new in edits.added]
    plan.rotated += [part + name for name, edit in done if isinstance(edit, Rotation)]
    plan.given += [part + name for name, edit in done if isinstance(edit, Tensor)]
    plan.untied |= {part + new: part + source for new, source in edits.apart.sources.items()}
    plan.retied_by += edits.apart.retied_by


def _plan_file(header: Header, edits: Edits, added: Sequence[Item]) -> FilePlan:
    """As in safetensors, wider dtypes come first, which keeps every tensor aligned."""
    items = [stored_item(tensor, edits.tensors.get(tensor.name)) for tensor in header.tensors.values()]
    for new in added:
        places = (i for i, other in enumerate(items) if _width(other) < _width(new))
        items.insert(next(places, len(items)), new)
    return FilePlan(_head(header.metadata, items) if added else header.raw, tuple(items))


def _width(item: Item) -> float:
    return item.size / max(1, math.prod(item.shape))


def _head(metadata: Mapping[str, str], items: Sequence[Item]) -> bytes:
    """The bytes of a safetensors header."""
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for item in items:
        offsets = [end, end + item.size]
        entries[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
        end += item.size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _index(found: WeightSet, added: Sequence[Item], file: str) -> bytes:
    """The index as transformers writes it, with new tensors in the last file; totals that are not numbers are kept."""
    entries: dict[str, Any] = dict(found.index_entries or {})
    entries["weight_map"] = {**entries["weight_map"], **{item.name: file for item in added}}
    if isinstance(entries.get("metadata"), dict):
        metadata = entries["metadata"] = dict(entries["metadata"])
        more = {
            "total_size": sum(item.size for item in added),
            "total_parameters": sum(math.prod(item.shape) for item in added),
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
        place[TIE_SETTING] = False
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()
