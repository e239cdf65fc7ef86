"""An adapter's folder in PEFT's form, and in that which `hra_fx.save_adapter` gives it.

Both have the same two files. Ours may hold more: how a chain splits into an anchor and trained vectors (as metadata),
and the vectors before Gram-Schmidt; PEFT passes over both. PEFT's may hold copies of what the base model has.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import read_adapter
from hra_fx.checkpoint.disk.weight_files import SAFE
from hra_fx.checkpoint.fitting import resume_of
from hra_fx.checkpoint.folder import write
from hra_fx.checkpoint.keys import PREFIX, VECTORS
from hra_fx.checkpoint.saving import RESUME
from hra_fx.checkpoint.weights import read
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import REFLECTION

Form = Literal["peft", "hra_fx"]
_OF_MODELS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        folder: where.
        form: whose it is now.
        layers: how many layers the adapter is at.
        r: how many plain reflections each has in the file.
        anchor: how many of them were frozen, and are trained from now on.
        dropped: keys that were left out.
        fields: entries of the configuration that were left out.
    """

    folder: Path
    form: Form
    layers: int
    r: int
    anchor: int
    dropped: tuple[str, ...]
    fields: tuple[str, ...]


def convert_adapter(source: str, out: Path, form: Form, *, overwrite: bool) -> Conversion:
    """Write an adapter in another form.

    Raises:
        HRAError: a file is missing or damaged, or the disk refuses.
        CheckpointError: `out` holds an adapter or other files already, and `overwrite` is not given; or a model.
    """
    files = read_adapter(source)
    tensors, metadata = read(files.file)
    resume = resume_of(files.file, metadata, files.config)
    _check_free(out, overwrite=overwrite)
    kept: dict[str, Tensor] = {}
    dropped: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        last = name.rpartition(".")[2]
        spelled = name.replace(".base_layer.", ".")
        ours = last == REFLECTION or spelled in files.full or (last == VECTORS and bool(resume["anchor"]))
        if (last != VECTORS) if form == "peft" else ours:
            kept[f"{PREFIX}{name}"] = tensor
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
            raise CheckpointError(f"{out}: there is an adapter in it. Give another folder, or overwrite=True.")
        return
    model = next((name for name in there if name in _OF_MODELS or name.endswith(SAFE)), None)
    if model:
        raise CheckpointError(
            f"{out}: {model} in it is of a model, with which from_pretrained would load the adapter. Give a folder of "
            "its own."
        )
    if there and not overwrite:
        raise CheckpointError(
            f"{out}: is not empty ({there[0]}), and has no adapter in it. Give another folder, or overwrite=True."
        )
