"""Inspect an adapter's two files, without its base model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import read_adapter
from hra_fx.cli.layers import natural
from hra_fx.config import CONFIG_NAME
from hra_fx.functional import householder
from hra_fx.functional.statistics import rotation_stats
from hra_fx.layers.target import REFLECTION


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer, with the values of `hra_fx.report`; angles in radians."""

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
class AdapterSummary:
    """An adapter.

    Attributes:
        folder: its folder.
        base_model: the base model according to its configuration.
        written_by: "hra_fx" or "PEFT <version>", according to its configuration.
        r: number of trained vectors per layer.
        gram_schmidt: whether the vectors are orthonormalized.
        anchor: number of frozen vectors per layer.
        dtype: dtype of the vectors.
        parameters: number of trainable parameters, without `saved`.
        saved: names of fully trained tensors, such as biases and new heads.
        layers: sorted by their numbers.
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


def inspect_adapter(source: str) -> AdapterSummary:
    """Inspect an adapter in a folder or on the Hub.

    Raises:
        HRAError: a file is missing, damaged, or of another method.
    """
    files = read_adapter(source)
    resume = files.resume
    dtype = next(tensor.dtype for key, tensor in files.tensors.items() if key.endswith(f".{REFLECTION}"))
    paths = sorted(files.chains, key=natural)
    layers = tuple(_layer(path, files.chains[path], resume["r"], dtype) for path in paths)
    base, targets = files.config.base_model_name_or_path, files.config.target_modules
    return AdapterSummary(
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
    # In the file's precision: rounding errors of vectors that cancel each other are not angles.
    turned = rotation_stats(chain.to(householder.working_dtype(dtype)))
    d = chain.shape[0]
    return AdaptedLayer(
        path, d, r, d * r, turned.rotation, turned.angle, turned.mean_angle, turned.angles, turned.orthogonality
    )


def _writer(file: Path) -> str:
    """The writer of a configuration: PEFT stores its version since 0.18, hra_fx leaves the entry empty."""
    entries = json.loads(file.read_text(encoding="utf-8"))
    if "peft_version" not in entries:
        return "PEFT before 0.18"
    return f"PEFT {entries['peft_version']}" if entries["peft_version"] else "hra_fx"
