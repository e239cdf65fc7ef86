"""Check that a base model on disk does not contain an adapter already."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.header import FLOATS
from hra_fx.checkpoint.disk.streams import read_first
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import HRAWarning


def check_not_folded(adapters: Iterable[AdapterFiles], folder: Path, found: WeightSet, names: FileNames) -> None:
    """Check the base of adapters, by the row that their files have of it.

    Args:
        adapters: the adapters.
        folder: the folder of the base model.
        found: its files.
        names: names in the files.

    Raises:
        CheckpointError: the base contains one of the adapters.

    Warns:
        HRAWarning: a file has no such row, as those of PEFT, and the base model that it names is called differently.
    """
    for adapter in adapters:
        row = adapter.base_row
        if row is None:
            _compare_names(adapter, folder)
        elif row.path in adapter.chains:
            first = _first_row(found, names, row.path, len(row.values))
            row.check(adapter.file, adapter.chains[row.path], first, str(folder))


def _first_row(found: WeightSet, names: FileNames, path: str, width: int) -> Tensor | None:
    for name, _, _ in names.weights_of(path):
        stored = found.tensors[name]
        if stored.dtype in FLOATS and math.prod(stored.shape[1:]) == width:
            return read_first(stored, width, FLOATS[stored.dtype])
    return None


def _compare_names(adapter: AdapterFiles, folder: Path) -> None:
    """Warn if the base models' names differ in their last parts."""
    theirs = os.fspath(adapter.config.base_model_name_or_path or "")
    if theirs and os.path.basename(os.path.normpath(theirs)) != folder.name:
        text = (
            f"{adapter.file}: the adapter was trained on {theirs!r}. Make sure that {folder} has the same weights, "
            "not those of a folded or merged model: this file does not say on which weights it was trained."
        )
        warnings.warn(text, HRAWarning, stacklevel=2)
