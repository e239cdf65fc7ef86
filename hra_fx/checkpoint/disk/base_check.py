"""Check that a model on disk is the base model of adapters, or the one into which they were folded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.base_model import compare_names
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.stored import FLOATS
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError


def check_base(adapters: Iterable[Adapter], folder: Path, found: WeightSet, names: FileNames, *, folded: bool) -> None:
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
        HRAWarning: the base model of an adapter has another name than the folder, and no row shows that it is the
            same, as for files of PEFT.
    """
    for adapter in adapters:
        row, state = adapter.base_row, "unknown"
        if row is not None and row.path in adapter.chains:
            state = row.state(adapter.chains[row.path], _first_row(found, names, row.path, len(row.values)))
            if state == "folded" and not folded:
                raise row.folded_error(adapter.file, str(folder))
            if state == "base" and folded:
                raise CheckpointError(
                    f"{folder} does not contain the adapter {adapter.file} (seen in {row.path}). Use the model into "
                    "which it was folded."
                )
        if state == "unknown" and not folded:
            compare_names(adapter.file, adapter.config, str(folder))


def _first_row(found: WeightSet, names: FileNames, path: str, width: int) -> Tensor | None:
    for name, _, _ in names.weights_of(path):
        stored = found.tensors[name]
        if stored.dtype in FLOATS and math.prod(stored.shape[1:]) == width:
            return stored.first_row()
    return None
