"""Build models from their `config.json`, on the meta device or with weights, and list their layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.checkpoint.disk.architecture import CONFIG, LIBRARIES
from hra_fx.checkpoint.disk.arguments import PIPELINE
from hra_fx.cli.screen import show_table
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import describe, weight_place, width_of
from hra_fx.reporting.columns import starred
from hra_fx.reporting.table import Column

#: Quantization methods whose layers can be adapted, by their names in transformers.
_QUANTIZED = ("bitsandbytes", "torchao")
_EXPECTED = "Pass the folder of a transformers, diffusers or timm model."


def build(path: Path, *, weights: bool = False) -> tuple[nn.Module, str]:
    """Build the model of a folder or a `config.json`. Returns the model in eval mode, and the name of its library.

    Args:
        path: the folder or file.
        weights: whether to load the weights. Otherwise the model is on the meta device.

    Raises:
        CheckpointError: the file is missing, its model type is unknown, or the model cannot be built or loaded.
    """
    if (path / PIPELINE).is_file():
        parts = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        raise CheckpointError(f"{path}: is a diffusers pipeline. Pass one of its parts: {', '.join(parts)}.")
    file = path / CONFIG if path.is_dir() else path
    entries = _entries(file)
    key = next((key for key in LIBRARIES if entries.get(key)), None)
    if key is None:
        raise CheckpointError(f"{file}: has none of the keys {', '.join(LIBRARIES)}. {_EXPECTED}")
    library, create = LIBRARIES[key]
    if find_spec(library) is None:
        raise CheckpointError(f"{file}: {library} is not installed. Run: pip install {library}.")
    if not weights:
        _warn_if_quantized(file, entries)
    try:
        with torch.device("cpu" if weights else "meta"):
            return create(file, entries, weights).eval(), library
    except CheckpointError:
        raise
    # With an unusual configuration, the constructors of hundreds of models may raise any error.
    except Exception as error:
        what = f"{file.parent}: {library} cannot load" if weights else f"{file}: {library} cannot build"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{what} the model ({reason}).") from error


def _entries(file: Path) -> Mapping[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot read the file as JSON ({error}). {_EXPECTED}") from error
    return entries if isinstance(entries, dict) else {}


def _warn_if_quantized(file: Path, entries: Mapping[str, Any]) -> None:
    """Warn that the model is built with its layers before quantization. Some libraries replace these layers."""
    given = entries.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in _QUANTIZED:
        warnings.warn(
            f"{file}: the weights are quantized by {method}, but the layers before quantization are shown. "
            f"hra_fx.transform supports quantized layers of {' and '.join(_QUANTIZED)}.",
            HRAWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class LayerSummary:
    """A layer that can be adapted.

    `d` is the length of its vectors, and `r` is their number in a configuration; for experts, `chains` is the number of
    experts.
    """

    path: str
    site: str
    d: int
    parameters: int
    r: int | None = None
    chains: int = 1

    @property
    def trained(self) -> int:
        """The number of adapter parameters."""
        return self.chains * self.d * (self.r or 0)


def summarize_layer(path: str, layer: nn.Module, r: int | None = None) -> LayerSummary:
    """Describe a layer that can be adapted."""
    owner, name = weight_place(layer)
    weight = owner._parameters[name]
    chains = layer.experts if isinstance(layer, ExpertsWeight) else 1
    return LayerSummary(path, describe(layer), width_of(layer), 0 if weight is None else weight.numel(), r, chains)


def show_layers(layers: Collection[LayerSummary]) -> None:
    """Print a table of layers. Layers with the same type, shape and rank and paths that differ in a number are one row.

    The table shows the parameters of an adapter if layers have a rank, otherwise the parameters of the layers.
    """
    groups: dict[tuple[str, str, int, int | None], list[LayerSummary]] = {}
    for layer in layers:
        groups.setdefault((starred(layer.path), layer.site, layer.d, layer.r), []).append(layer)
    columns = (
        Column("layer", is_text=True),
        Column("count"),
        Column("type", is_text=True, priority=2),
        Column("d", priority=1),
        Column("r", priority=1),
        Column("params"),
    )
    rows = []
    for (path, site, d, r), found in groups.items():
        parameters = sum(layer.parameters if r is None else layer.trained for layer in found)
        name = path if len(found) > 1 else found[0].path
        rows.append((name, str(len(found)), site, str(d), "" if r is None else str(r), f"{parameters:,}"))
    show_table(columns, rows)
