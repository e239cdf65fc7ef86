"""Check that a model on disk is the base model of adapters, or the one into which they were folded."""

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
from hra_fx.errors import CheckpointError, HRAWarning


def check_base(
    adapters: Iterable[AdapterFiles], folder: Path, found: WeightSet, names: FileNames, *, folded: bool
) -> None:
    """Check a model by the row that the files of adapters have of their base model.

    Args:
        adapters: the adapters.
        folder: the folder of the model.
        found: its files.
        names: names in the files.
        folded: whether the adapters have to be folded into it.

    Raises:
        CheckpointError: the model contains one of the adapters; or with `folded`, it does not.

    Warns:
        HRAWarning: a file has no row, as those of PEFT, and its base model has another name than the folder.
    """
    for adapter in adapters:
        row = adapter.base_row
        if row is None:
            if not folded:
                _compare_names(adapter, folder)
            continue
        if row.path not in adapter.chains:
            continue
        state = row.state(adapter.chains[row.path], _first_row(found, names, row.path, len(row.values)))
        if state == "folded" and not folded:
            raise row.folded_error(adapter.file, str(folder))
        if state == "base" and folded:
            raise CheckpointError(
                f"{folder} does not contain the adapter {adapter.file} (seen in {row.path}). Use the model into which "
                "it was folded."
            )


def _first_row(found: WeightSet, names: FileNames, path: str, width: int) -> Tensor | None:
    for name, _, _ in names.weights_of(path):
        stored = found.tensors[name]
        if stored.dtype in FLOATS and math.prod(stored.shape[1:]) == width:
            return read_first(stored, width, FLOATS[stored.dtype])
    return None


def _compare_names(adapter: AdapterFiles, folder: Path) -> None:
    """Warn if the base models' names differ in their last parts."""
    theirs = os.fspath(adapter.config.base_model_name_or_path or "")
    if theirs and os.path.basename(os.path.normpath(theirs)) != _model_name(folder):
        text = (
            f"{adapter.file}: the adapter was trained on {theirs!r}. Make sure that {folder} has the same weights, "
            "not those of a folded or merged model: this file does not say on which weights it was trained."
        )
        warnings.warn(text, HRAWarning, stacklevel=2)


def _model_name(folder: Path) -> str:
    """The name of a model: that of its folder, or of its repository in the Hub's cache.

    >>> _model_name(Path("hub/models--org--tiny/snapshots/0123abc")), _model_name(Path("models/tiny"))
    ('tiny', 'tiny')
    """
    cached = folder.parent.name == "snapshots"
    return folder.parent.parent.name.rpartition("--")[2] if cached else folder.name
