"""What a call asks for: folders that do not overlap, and for each folder of weights its adapters in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles, read_adapter
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError

#: A folder, or the name of a repository on the Hub, where an adapter is.
Source: TypeAlias = str | os.PathLike[str]
Adapters: TypeAlias = Source | Sequence[Source]
_PIPELINE = "model_index.json"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        base: the folder of the base, without symbolic links.
        out: the folder to be made.
        adapters: folder in the base -> its adapters.
        files: path in the base -> file, of all that is in it.
        folders: path in the base -> folder, the base itself under "".
    """

    base: Path
    out: Path
    adapters: dict[str, list[AdapterFiles]]
    files: dict[str, Path]
    folders: dict[str, Path]


def read_request(base_dir: Source, adapter_dir: Adapters | Mapping[str, Adapters], out_dir: Source) -> Request:
    """Check folders, and read adapters.

    Raises:
        CheckpointError: a folder is not there, or two overlap; or an adapter does not say which part it is for.
    """
    base, out = (Path(os.path.realpath(folder)) for folder in (base_dir, out_dir))
    if not base.is_dir():
        what = "is a file. Give the folder that it is in" if base.is_file() else "there is no such folder here"
        raise CheckpointError(f"{base_dir}: {what}. A model of the Hub: huggingface_hub.snapshot_download(name).")
    for folder in (out, *out.parents):
        if os.path.exists(folder) and not folder.is_dir():  # of a name that is too long it says no
            way_out = "Give a folder that does not exist yet" if folder == out else f"{out_dir} cannot be in it"
            raise CheckpointError(f"{out_dir if folder == out else folder}: is a file. {way_out}.")
    sources = _by_folder(base, adapter_dir)
    inputs = {"base_dir": base}
    for several in sources.values():
        inputs |= {f"adapter_dir {source}": Path(os.path.realpath(source)) for source in several}
    for name, folder in inputs.items():
        if out == folder or out in folder.parents or (name == "base_dir" and folder in out.parents):
            raise CheckpointError(
                f"out_dir: {out} is, holds or lies in {folder} ({name}), which is never written to. Give a folder "
                "beside it."
            )
    adapters = {name: [read_adapter(source) for source in several] for name, several in sources.items()}
    tree = {"": base, **dict(_tree(base, base, (base,)))}
    folders = {path: found for path, found in tree.items() if found.is_dir()}
    files = {path: found for path, found in tree.items() if path not in folders}
    return Request(base, out, adapters, files, folders)


def _by_folder(base: Path, adapter_dir: Adapters | Mapping[str, Adapters]) -> dict[str, list[Source]]:
    if isinstance(adapter_dir, Mapping):
        named = {_inside(base, name): _listed(given) for name, given in adapter_dir.items()}
        if not all(named.values()) or not named:
            raise CheckpointError("adapter_dir: it names no adapter. Give a folder, or several in their order.")
        return named
    sources = _listed(adapter_dir)
    if not sources:
        raise CheckpointError("adapter_dir: it names no adapter. Give a folder, or several in their order.")
    if not (base / _PIPELINE).is_file():
        return {"": sources}
    parts: dict[str, list[Source]] = {}
    for source in sources:
        for folder in _parts_of(base, source):
            parts.setdefault(folder.name, []).append(folder)
    return parts


def _parts_of(base: Path, source: Source) -> list[Path]:
    """The subfolders of an adapter's folder, each of which is for the part of a pipeline that is called as it is."""
    if not Path(source).is_dir():
        raise CheckpointError(
            f"adapter_dir: {source} is no folder here, and a name on the Hub does not tell for which part of the "
            f"pipeline {base} it is. Say so: adapter_dir={{'unet': {str(source)!r}}}."
        )
    found = [file.parent for file in sorted(Path(source).glob(f"*/{CONFIG_NAME}"))]
    placed = [folder for folder in found if (base / folder.name).is_dir()]
    if not placed:
        raise CheckpointError(
            f"adapter_dir: {source} has no subfolder with an adapter that is called as a part of the pipeline "
            f"{base}, such as 'unet'. Say for which part it is: adapter_dir={{'unet': {str(source)!r}}}."
        )
    left = [folder for folder in found if folder not in placed]
    left += [Path(source)] if (Path(source) / CONFIG_NAME).is_file() else []
    if left:
        named = ", ".join(f"{folder.name!r}: {str(folder)!r}" for folder in placed)
        raise CheckpointError(
            f"adapter_dir: {left[0]} has an adapter too, and the pipeline {base} has no part of that name. Say which "
            f"are meant, and for which parts: adapter_dir={{{named}}}."
        )
    return placed


def _listed(given: Adapters | None) -> list[Source]:
    return [given] if isinstance(given, (str, os.PathLike)) else list(given or ())


def _inside(base: Path, name: str) -> str:
    folder = Path(os.path.normpath(base / name))
    if not folder.is_dir() or (folder != base and base not in folder.parents):
        parts = ", ".join(repr(part.name) for part in sorted(base.iterdir()) if part.is_dir())
        raise CheckpointError(f"adapter_dir: {name!r} is no folder in {base}. There are {parts or 'none'}.")
    return "" if folder == base else folder.relative_to(base).as_posix()


def _tree(base: Path, folder: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """All that is below a folder. Symbolic links are followed, as in the cache of the Hub, but for circles."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            real = Path(os.path.realpath(entry))
            if real in above:
                raise CheckpointError(f"{entry}: is a link to a folder that it is in. Remove it from the base.")
            yield entry.relative_to(base).as_posix(), entry
            yield from _tree(base, entry, (*above, real))
        elif entry.is_file():
            yield entry.relative_to(base).as_posix(), entry
        else:
            raise CheckpointError(f"{entry}: is a broken link, or no file and no folder. Remove it from the base.")
