"""Convert an adapter's folder between the formats of PEFT and `hra_fx.save_adapter`.

Both have the same two files. Files of hra_fx may also contain how a chain splits into an anchor and trained vectors (as
metadata), and the vectors before Gram-Schmidt; PEFT ignores both. Files of PEFT may contain copies of base weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import read_adapter
from hra_fx.checkpoint.disk.weight_files import SAFE
from hra_fx.checkpoint.folder import write
from hra_fx.checkpoint.keys import PREFIX, VECTORS
from hra_fx.checkpoint.saving import RESUME
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import REFLECTION

Form = Literal["peft", "hra_fx"]
_OF_MODELS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: the new folder.
        form: its format.
        layers: number of adapted layers.
        r: number of reflections per layer in the file.
        anchor: number of them that were frozen, and can be trained from now on.
        dropped: keys that were dropped.
        fields: fields of the configuration that were dropped.
    """

    folder: Path
    form: Form
    layers: int
    r: int
    anchor: int
    dropped: tuple[str, ...]
    fields: tuple[str, ...]


def convert_adapter(source: str, out: Path, form: Form, *, overwrite: bool) -> Conversion:
    """Write an adapter in another format.

    Raises:
        HRAError: a file is missing or damaged, or writing fails.
        CheckpointError: `out` contains a model, or other files without `overwrite`.
    """
    files = read_adapter(source)
    resume, metadata = files.resume, files.metadata
    _check_free(out, overwrite=overwrite)
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, tensor in files.tensors.items():
        name = key.removeprefix(PREFIX)
        last = name.rpartition(".")[2]
        spelled = name.replace(".base_layer.", ".")
        ours = last == REFLECTION or spelled in files.full or (last == VECTORS and bool(resume["anchor"]))
        if (last != VECTORS) if form == "peft" else ours:
            kept[key] = tensor
        else:
            dropped.append(key)
    config = dataclasses.replace(files.config, extra={}, peft_version=None)
    splits = {RESUME: metadata[RESUME]} if form == "hra_fx" and RESUME in metadata else {}
    write(out, config.to_json_string(), kept, splits)
    given_up = resume["anchor"] if form == "peft" else 0
    fields = (*sorted(files.config.extra), *(["peft_version"] if files.config.peft_version else []))
    return Conversion(out, form, len(files.chains), config.r, given_up, tuple(dropped), fields)


def _check_free(out: Path, *, overwrite: bool) -> None:
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if CONFIG_NAME in there:
        if not overwrite:
            raise CheckpointError(f"{out}: already contains an adapter. Choose another folder, or --overwrite.")
        return
    model = next((name for name in there if name in _OF_MODELS or name.endswith(SAFE)), None)
    if model:
        raise CheckpointError(
            f"{out}: contains a model ({model}), and from_pretrained would load the adapter with it. Choose another "
            "folder."
        )
    if there and not overwrite:
        raise CheckpointError(f"{out}: is not empty (it contains {there[0]}). Choose another folder, or --overwrite.")
