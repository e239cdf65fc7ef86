"""Compare two checkpoints tensor by tensor."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hra_fx.checkpoint.disk.header import StoredTensor, read_header
from hra_fx.checkpoint.disk.progress_bar import bar
from hra_fx.checkpoint.disk.weight_files import weight_sets
from hra_fx.cli.layers import natural
from hra_fx.cli.tensor_change import change_of
from hra_fx.errors import CheckpointError

_SAFE = ".safetensors"


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between the checkpoints.

    Attributes:
        name: its key, after its folder and a colon if there are several.
        how: see `Change.how`, or "shape", "only in A", "only in B".
        shapes: in `A` and `B`; `None` if missing.
        dtypes: names in the safetensors format.
        relative: see `Change`; NaN if the values cannot be compared, as for the next two.
        largest: see `Change`.
        lengths: see `Change`.
    """

    name: str
    how: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    relative: float = math.nan
    largest: float = math.nan
    lengths: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints.

    Attributes:
        a: path of the first.
        b: path of the second.
        tolerance: relative change up to which tensors count as equal.
        equal: number of equal tensors.
        differences: the other tensors, sorted by name.
    """

    a: Path
    b: Path
    tolerance: float
    equal: int
    differences: tuple[Difference, ...]


def compare(a: Path, b: Path, tolerance: float, *, progress: bool) -> Comparison:
    """Compare two checkpoints: folders with their subfolders, or files.

    Args:
        a: the first.
        b: the second.
        tolerance: the largest `|B - A|_F / |A|_F` that counts as equal.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: one of them does not exist, has no safetensors files, or is damaged.
    """
    ours, theirs = _tensors(a), _tensors(b)
    names = sorted(ours.keys() | theirs.keys(), key=natural)
    equal, found = 0, []
    total = sum(tensor.size for tensor in ours.values())
    with ExitStack() as files, bar("comparing", total, wanted=progress) as advance:
        values = _Values(files)
        for name in names:
            difference = _difference(name, ours.get(name), theirs.get(name), values)
            advance(ours[name].size if name in ours else 0)
            if difference.how == "equal" or (tolerance and difference.relative <= tolerance):
                equal += 1
            else:
                found.append(difference)
    return Comparison(a, b, tolerance, equal, tuple(found))


class _Values:
    """Reads tensors of memory-mapped files."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, Any] = {}

    def of(self, stored: StoredTensor) -> Tensor:
        if stored.file not in self._open:
            self._open[stored.file] = self._stack.enter_context(safe_open(stored.file, framework="pt", device="cpu"))
        tensor: Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor


def _difference(name: str, one: StoredTensor | None, other: StoredTensor | None, values: _Values) -> Difference:
    shapes = (one.shape if one else None, other.shape if other else None)
    dtypes = (one.dtype if one else None, other.dtype if other else None)
    if one is None or other is None:
        return Difference(name, "only in B" if one is None else "only in A", shapes, dtypes)
    if one.shape != other.shape:
        return Difference(name, "shape", shapes, dtypes)
    change = change_of(values.of(one), values.of(other))
    # Equal values in another dtype still differ.
    how = "dtype" if change.how == "equal" and one.dtype != other.dtype else change.how
    return Difference(name, how, shapes, dtypes, change.relative, change.largest, change.lengths)


def _tensors(path: Path) -> dict[str, StoredTensor]:
    if path.is_file():
        return dict(read_header(path).tensors)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder or file.")
    folders = sorted({file.parent for file in path.rglob(f"*{_SAFE}")}) or [path]
    sets = [(folder, found) for folder in folders for found in weight_sets(folder)]
    tensors: dict[str, StoredTensor] = {}
    for folder, found in sets:
        place = folder.relative_to(path).as_posix()
        # Several sets in a folder are variants of one model with the same keys, such as model.fp16.safetensors.
        several = sum(other == folder for other, _ in sets) > 1
        variant = Path(found.name).name.partition(_SAFE)[0] if several else ""
        prefix = "/".join(part for part in (place, variant) if part not in ("", "."))
        tensors |= {f"{prefix}:{name}" if prefix else name: tensor for name, tensor in found.tensors.items()}
    return tensors
