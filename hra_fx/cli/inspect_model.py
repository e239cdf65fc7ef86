"""What a model's folder tells without its weights: the layers that could carry reflections."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from hra_fx.checkpoint.disk.header import read_header
from hra_fx.cli.building import CONFIG, build
from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError
from hra_fx.layers.target import describe, find_kind, weight_name, width_of
from hra_fx.selection.select import resolve_targets


@dataclass(frozen=True)
class SiteLook:
    """A layer that could carry reflections; `d` is the length that its vectors would have."""

    path: str
    site: str
    d: int
    parameters: int


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file, by its header."""

    name: str
    tensors: int
    bytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class ModelLook:
    """A model.

    Attributes:
        model: its class.
        library: whose it is.
        parameters: how many numbers it holds, tied ones once.
        default_targets: what is adapted where `target_modules` is not given; `None` where that must be given.
        files: its weights.
        layers: in model order, each once.
    """

    folder: Path
    model: str
    library: str
    parameters: int
    default_targets: tuple[str, ...] | str | None
    files: tuple[WeightFile, ...]
    layers: tuple[SiteLook, ...]
    kind: str = field(default="model", init=False)


def look_at_model(path: Path) -> ModelLook:
    """Look at a folder with a `config.json`.

    Raises:
        CheckpointError: no installed library knows its model, or a file of weights is damaged.
    """
    built = build(path)
    folder = path if path.is_dir() else path.parent
    # What lies beside a configuration of another name may be of any model.
    weights = sorted(folder.glob("*.safetensors")) if path.is_dir() or path.name == CONFIG else []
    return ModelLook(
        folder=folder,
        model=type(built.model).__name__,
        library=built.library,
        parameters=sum(parameter.numel() for parameter in built.model.parameters()),
        default_targets=_default_targets(built.model),
        files=tuple(_file(file) for file in weights),
        layers=tuple(
            site_look(name, layer) for name, layer in built.model.named_modules() if name and find_kind(layer)
        ),
    )


def site_look(path: str, layer: nn.Module) -> SiteLook:
    """A layer that could carry reflections."""
    kind = find_kind(layer)
    weight = layer._parameters[weight_name(kind)] if kind else None
    return SiteLook(path, describe(layer), width_of(layer), 0 if weight is None else weight.numel())


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
