"""Check the arguments of a fold: folders must not overlap, and each folder of weights gets its adapters, in order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hra_fx.checkpoint.adapter import Adapter, read_adapter
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError

#: Folder of an adapter, or its name on the Hub.
Source: TypeAlias = str | os.PathLike[str]
Adapters: TypeAlias = Source | Sequence[Source]
#: The file that describes a diffusers pipeline.
PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Request:
    """The checked arguments.

    Attributes:
        base: folder of the base model, without symbolic links.
        out: folder to create.
        adapters: folder in the base -> its adapters.
        files: path in the base -> file.
        folders: path in the base -> folder, including the base itself as ".".
    """

    base: Path
    out: Path
    adapters: dict[str, list[Adapter]]
    files: dict[str, Path]
    folders: dict[str, Path]


def read_request(base_dir: Source, adapter_dir: Adapters | Mapping[str, Adapters], out_dir: Source) -> Request:
    """Check folders, and read adapters.

    Raises:
        CheckpointError: a folder does not exist, two folders overlap, or the part for an adapter is unknown.
    """
    base, out = base_folder(base_dir), Path(os.path.realpath(out_dir))
    if os.path.isfile(out):
        raise CheckpointError(f"{out_dir}: is a file. Choose another output folder.")
    sources = _by_folder(base, adapter_dir)
    inputs = {"the base": base}
    for several in sources.values():
        inputs |= {f"adapter {source}": Path(os.path.realpath(source)) for source in several}
    for name, folder in inputs.items():
        if out == folder or out in folder.parents or (name == "the base" and folder in out.parents):
            raise CheckpointError(
                f"{out}: the output folder overlaps with {name}, {folder}. Choose a folder outside of it."
            )
    adapters = {name: [read_adapter(source) for source in several] for name, several in sources.items()}
    folders, files = _tree(base)
    return Request(base, out, adapters, files, folders)


def base_folder(base_dir: Source) -> Path:
    """The folder of a base model, without symbolic links.

    Raises:
        CheckpointError: the folder does not exist.
    """
    base = Path(os.path.realpath(base_dir))
    if not base.is_dir():
        what = "is a file. Pass a folder" if base.is_file() else "no such folder. Pass one"
        raise CheckpointError(
            f"{base_dir}: {what} with config.json and safetensors files, such as save_pretrained(folder) or "
            "`hf download NAME --local-dir FOLDER` writes."
        )
    return base


def _by_folder(base: Path, adapter_dir: Adapters | Mapping[str, Adapters]) -> dict[str, list[Source]]:
    if isinstance(adapter_dir, Mapping):
        named = {_inside(base, name): _listed(given) for name, given in adapter_dir.items()}
    else:
        named = {"": _listed(adapter_dir)}
    if not named or not all(named.values()):
        raise CheckpointError("adapter_dir must name at least one adapter. Pass one or more folders, in order.")
    if isinstance(adapter_dir, Mapping) or not (base / PIPELINE).is_file():
        return named
    parts: dict[str, list[Source]] = {}
    for source in named[""]:
        for folder in _parts_of(base, source):
            parts.setdefault(folder.name, []).append(folder)
    return parts


def _parts_of(base: Path, source: Source) -> list[Path]:
    """The subfolders of an adapter folder that have the name of a part of the pipeline."""
    found = [file.parent for file in sorted(Path(source).glob(f"*/{CONFIG_NAME}"))]
    placed = [folder for folder in found if (base / folder.name).is_dir()]
    if not placed:
        raise CheckpointError(
            f"{source}: no subfolder with an adapter has the name of a part of the pipeline {base}, such as 'unet'. "
            f"Use adapter_dir={{'unet': {str(source)!r}}} (--part unet)."
        )
    left = [folder for folder in found if folder not in placed]
    left += [Path(source)] if (Path(source) / CONFIG_NAME).is_file() else []
    if left:
        named = ", ".join(f"{folder.name!r}: {str(folder)!r}" for folder in placed)
        raise CheckpointError(
            f"{left[0]}: has an adapter, but the pipeline {base} has no part with this name. Name the parts: "
            f"adapter_dir={{{named}}} (--part, one part at a time)."
        )
    return placed


def _listed(given: Adapters | None) -> list[Source]:
    return [given] if isinstance(given, (str, os.PathLike)) else list(given or ())


def _inside(base: Path, name: str) -> str:
    folder = Path(os.path.normpath(base / name))
    if not folder.is_dir() or (folder != base and base not in folder.parents):
        parts = ", ".join(repr(part.name) for part in sorted(base.iterdir()) if part.is_dir())
        raise CheckpointError(f"{base}: no such subfolder {name!r} (adapter_dir, --part). It has {parts or 'none'}.")
    return "" if folder == base else folder.relative_to(base).as_posix()


def _tree(base: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """All folders, including the base itself as ".", and all files. Links are followed, as in the Hub cache."""
    folders, files = {}, {}
    for folder, _, names in os.walk(base, followlinks=True):
        folders[Path(folder).relative_to(base).as_posix()] = Path(folder)
        for path in (Path(folder, name) for name in names):
            if not path.is_file():
                raise CheckpointError(f"{path}: is a broken link, or not a regular file. Remove it from the base.")
            files[path.relative_to(base).as_posix()] = path
    return folders, files
