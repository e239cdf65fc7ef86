"""Plan everything that a call writes, for all parts of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.edit_types import FilePlan
from hra_fx.checkpoint.disk.planning import FolderPlan, plan_folder
from hra_fx.errors import CheckpointError

#: Increased when the written files change, so that an older unfinished result is not resumed.
_FORMAT = 2


@dataclass(frozen=True)
class Result:
    """The planned result.

    Attributes:
        files: path in the new folder -> planned safetensors file.
        texts: path -> content.
        copies: path -> file of the base.
        parts: folder in the base -> its plan.
        inputs: everything that the result depends on.
    """

    files: dict[str, FilePlan]
    texts: dict[str, bytes]
    copies: dict[str, Path]
    parts: dict[str, FolderPlan]
    inputs: dict[str, Any]

    def sizes(self) -> dict[str, int]:
        """Path -> size in bytes."""
        return {
            **{path: plan.size for path, plan in self.files.items()},
            **{path: len(text) for path, text in self.texts.items()},
            **{path: file.stat().st_size for path, file in self.copies.items()},
        }


def result_of(request: Request, columns: Collection[str] | None, *, back: bool) -> Result:
    """Plan every part.

    Args:
        request: the arguments.
        columns: see `fold_checkpoint`.
        back: whether to undo a fold.

    Raises:
        CheckpointError: see `plan_folder`; or an adapter replaced values, which cannot be restored.
        FoldError: see `plan_folder`.
    """
    parts: dict[str, FolderPlan] = {}
    files: dict[str, FilePlan] = {}
    texts: dict[str, bytes] = {}
    for name, adapters in request.adapters.items():
        ordered = [_reversed(adapter) for adapter in reversed(adapters)] if back else adapters
        plan = parts[name] = plan_folder(request.base / name, ordered, columns)
        files |= {_path(name, file): planned for file, planned in plan.files.items()}
        texts |= {_path(name, file): text for file, text in plan.texts.items()}
    copies = {path: file for path, file in request.files.items() if path not in files and path not in texts}
    return Result(files, texts, copies, parts, _inputs(request, columns, files, back=back))


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
    return dataclasses.replace(adapter, chains={path: chain.flip(1) for path, chain in adapter.chains.items()})


def _path(part: str, file: str) -> str:
    return f"{part}/{file}" if part else file


def _inputs(
    request: Request, columns: Collection[str] | None, files: Mapping[str, FilePlan], *, back: bool
) -> dict[str, Any]:
    heads = hashlib.sha256()
    for _, plan in sorted(files.items()):
        heads.update(plan.head)
    return {
        "format": _FORMAT,
        "back": back,
        "base": str(request.base),
        "files": stamps(request.files),
        "folders": sorted(request.folders),
        "heads": heads.hexdigest(),
        "adapters": {name: [adapter.digest for adapter in found] for name, found in request.adapters.items()},
        "columns": None if columns is None else sorted(columns),
    }
