"""The weights in a folder: sets of safetensors files that hold one state dict each, and files that are not read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hra_fx.checkpoint.disk.header import Header, Stored, read_header
from hra_fx.errors import CheckpointError

SAFE = ".safetensors"
_INDEX = f"{SAFE}.index.json"
#: Weights that are never opened, for they are pickles, or of another library.
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")
#: Files with such an ending that a training leaves beside a model, and that hold no weights of it.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


@dataclass(frozen=True)
class WeightSet:
    """Files that hold one state dict.

    Attributes:
        files: their headers, sorted by name.
        index: the file that says which tensor is where, if there is one.
        index_entries: what it holds.
    """

    files: tuple[Header, ...]
    index: Path | None = None
    index_entries: Mapping[str, Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Key -> tensor, of all files."""
        return {name: tensor for header in self.files for name, tensor in header.tensors.items()}

    @property
    def name(self) -> str:
        """For messages: the index, or the only file."""
        return str(self.index or self.files[0].file)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Key that is not there -> key of the tensor that stands for it: what `safetensors.torch.save_model` leaves."""
        found: dict[str, str] = {}
        for header in self.files:
            for name, kept in header.metadata.items():
                if name not in self.tensors and kept in self.tensors:
                    found[name] = kept
        return found


def weight_sets(folder: Path) -> list[WeightSet]:
    """All sets of a folder itself, subfolders not looked at.

    Raises:
        CheckpointError: there is none (pickles are named), a shard is missing or damaged, or an index is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "pytorch_model.bin").write_bytes(b"")
    ...     weight_sets(Path(folder))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: ...pytorch_model.bin: is a pickle or of another library, and is never read. Save ...
    """
    indices = sorted(folder.glob(f"*{_INDEX}"))
    sets = [_of_index(index) for index in indices]
    taken = {header.file for found in sets for header in found.files}
    lone = (file for file in sorted(folder.glob(f"*{SAFE}")) if file not in taken)
    sets += [WeightSet((read_header(file),)) for file in lone if file.is_file()]
    if sets:
        return sets
    if others := sorted(foreign(folder)):
        raise CheckpointError(
            f"{others[0]}: is a pickle or of another library, and is never read. Save the model as safetensors first: "
            "load it, then model.save_pretrained(folder)."
        )
    below = sorted(file.parent.relative_to(folder).as_posix() for file in folder.glob(f"*/*{SAFE}"))
    way_out = "Give the folder of a checkpoint."
    if below:
        names = ", ".join(map(repr, dict.fromkeys(below)))
        way_out = f"There are some in its subfolders {names}: give adapter_dir={{subfolder: adapter}}, or that folder."
    raise CheckpointError(f"{folder}: there is no {SAFE} file in it. {way_out}")


def foreign(folder: Path) -> Iterator[Path]:
    """Files of a folder, at any depth, that may hold weights in a form that is not read."""
    for file in folder.rglob("*"):
        if file.suffix in OTHERS and not file.name.startswith(_NO_WEIGHTS):
            yield file


def _of_index(index: Path) -> WeightSet:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        places: dict[str, str] = dict(entries["weight_map"])
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: cannot be read, or has no weight_map ({error!r}). Fetch it again.") from error
    headers: dict[str, Header] = {}
    for name in names:
        file = index.parent / name
        if file.parent != index.parent or not file.is_file():
            raise CheckpointError(f"{index}: it names {name!r}, and there is no such file beside it. Fetch it again.")
        headers[name] = read_header(file)
    for key, name in places.items():
        if key not in headers[name].tensors:
            raise CheckpointError(f"{index}: it has {key!r} in {name!r}, which does not hold it. Fetch both again.")
    counts = sum(len(header.tensors) for header in headers.values())
    if counts != len(places):
        raise CheckpointError(
            f"{index}: it lists {len(places)} tensors, and its files hold {counts}. Fetch them again."
        )
    return WeightSet(tuple(headers[name] for name in names), index, entries)
