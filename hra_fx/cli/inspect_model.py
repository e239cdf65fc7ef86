"""Inspect a model's folder without loading its weights: the layers that can be adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from hra_fx.checkpoint.disk.header import read_header
from hra_fx.cli.building import CONFIG, build
from hra_fx.cli.layers import LayerSummary, summarize_layer
from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError
from hra_fx.layers.target import find_kind
from hra_fx.selection.select import resolve_targets


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file, according to its header."""

    name: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class ModelSummary:
    """A model.

    Attributes:
        model: its class.
        library: the library that it is from.
        parameters: number of parameters, tied ones counted once.
        default_targets: the default `target_modules`; `None` if there is none.
        files: its weight files.
        layers: in model order, each once.
    """

    folder: Path
    model: str
    library: str
    parameters: int
    default_targets: tuple[str, ...] | str | None
    files: tuple[WeightFile, ...]
    layers: tuple[LayerSummary, ...]
    kind: str = field(default="model", init=False)


def inspect_model(path: Path) -> ModelSummary:
    """Inspect a folder with a `config.json`.

    Raises:
        CheckpointError: no installed library knows the model, or a weight file is damaged.
    """
    model, library = build(path)
    folder = path if path.is_dir() else path.parent
    # Weights next to a configuration with another name may belong to another model.
    weights = sorted(folder.glob("*.safetensors")) if path.is_dir() or path.name == CONFIG else []
    return ModelSummary(
        folder=folder,
        model=type(model).__name__,
        library=library,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        default_targets=_default_targets(model),
        files=tuple(_file(file) for file in weights),
        layers=tuple(
            summarize_layer(name, layer) for name, layer in model.named_modules() if name and find_kind(layer)
        ),
    )


def _default_targets(model: nn.Module) -> tuple[str, ...] | str | None:
    try:
        targets = resolve_targets(model, HRAConfig())
    except SelectionError:
        return None
    return targets if isinstance(targets, str) else tuple(sorted(targets))


def _file(file: Path) -> WeightFile:
    header = read_header(file)
    dtypes = dict.fromkeys(tensor.dtype for tensor in header.tensors.values())
    return WeightFile(file.name, len(header.tensors), file.stat().st_size, tuple(dtypes))
