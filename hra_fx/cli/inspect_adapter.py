"""What the two files of an adapter tell without its base model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import read_adapter
from hra_fx.checkpoint.fitting import resume_of
from hra_fx.checkpoint.weights import read
from hra_fx.cli.paths import natural
from hra_fx.config import CONFIG_NAME
from hra_fx.functional import householder
from hra_fx.functional.statistics import rotation_stats
from hra_fx.layers.target import REFLECTION


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapter at a layer; the numbers are those of `hra_fx.report`, angles in radians."""

    path: str
    d: int
    r: int
    parameters: int
    rotation: float
    angle: float
    mean_angle: float
    angles: tuple[float, ...]
    orthogonality: float


@dataclass(frozen=True)
class AdapterLook:
    """An adapter.

    Attributes:
        folder: where it is.
        base_model: what it was trained on, by its configuration.
        written_by: "hra_fx" or "PEFT <version>", by its configuration.
        r: how many vectors are trained at each layer.
        gram_schmidt: whether these are made orthonormal.
        anchor: how many frozen ones stand before them, 0 where it has no anchor.
        dtype: of the vectors.
        parameters: how many numbers are trained, without those of `saved`.
        saved: names of tensors that were trained in full, such as biases and new heads.
        layers: in the order of their numbers.
    """

    folder: Path
    base_model: str | None
    written_by: str
    task_type: str | None
    target_modules: tuple[str, ...] | str | None
    r: int
    gram_schmidt: bool
    anchor: int
    dtype: str
    parameters: int
    saved: tuple[str, ...]
    layers: tuple[AdaptedLayer, ...]
    kind: str = field(default="adapter", init=False)


def look_at_adapter(source: str) -> AdapterLook:
    """Read an adapter, from a folder or from the Hub.

    Raises:
        HRAError: a file is missing or damaged, or of another method.
    """
    files = read_adapter(source)
    tensors, metadata = read(files.file)
    resume = resume_of(files.file, metadata, files.config)
    dtype = next(tensor.dtype for key, tensor in tensors.items() if key.endswith(f".{REFLECTION}"))
    paths = sorted(files.chains, key=natural)
    layers = tuple(_layer(path, files.chains[path], resume["r"], dtype) for path in paths)
    base, targets = files.config.base_model_name_or_path, files.config.target_modules
    return AdapterLook(
        folder=files.file.parent,
        base_model=str(base) if base else None,
        written_by=_writer(files.file.with_name(CONFIG_NAME)),
        task_type=files.config.task_type,
        target_modules=targets if isinstance(targets, str) or targets is None else tuple(sorted(targets)),
        r=resume["r"],
        gram_schmidt=resume["apply_GS"],
        anchor=resume["anchor"],
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(layer.parameters for layer in layers),
        saved=tuple(sorted(files.full, key=natural)),
        layers=layers,
    )


def _layer(path: str, chain: Tensor, r: int, dtype: torch.dtype) -> AdaptedLayer:
    # In the precision of the file, for what rounding to it left of vectors that cancel each other is no angle.
    turned = rotation_stats(chain.to(householder.working_dtype(dtype)))
    d = chain.shape[0]
    return AdaptedLayer(
        path, d, r, d * r, turned.rotation, turned.angle, turned.mean_angle, turned.angles, turned.orthogonality
    )


def _writer(file: Path) -> str:
    """Who wrote a configuration: PEFT names its release since 0.18, hra_fx leaves that entry empty."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    if "peft_version" not in entries:
        return "PEFT before 0.18"
    return f"PEFT {entries['peft_version']}" if entries["peft_version"] else "hra_fx"
