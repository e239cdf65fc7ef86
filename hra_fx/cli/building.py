"""Build models from their `config.json`, on the meta device or with weights, and list their layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.checkpoint.disk.architecture import CONFIG, EXPECTED, PIPELINE, build_model
from hra_fx.cli.screen import show_table
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.target import describe, held_weight, width_of
from hra_fx.reporting.columns import grouped
from hra_fx.reporting.table import Column

#: Quantization methods whose layers can be adapted, by their names in transformers.
_QUANTIZED = ("bitsandbytes", "torchao", "gptq", "awq", "hqq")


def build(path: Path, *, weights: bool = False) -> tuple[nn.Module, str]:
    """Build the model of a folder or a `config.json`, on the meta device unless with `weights`, in eval mode.

    Returns the model, and the name of its library.
    """
    if (path / PIPELINE).is_file():
        parts = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        raise CheckpointError(f"{path}: is a diffusers pipeline. Pass one of its parts: {', '.join(parts)}.")
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file. {EXPECTED}")
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot read the file as JSON ({error}). {EXPECTED}") from error
    entries = entries if isinstance(entries, dict) else {}
    if not weights:
        _warn_if_quantized(file, entries)
    model, library = build_model(file, entries, weights=weights)
    return model.eval(), library


def _warn_if_quantized(file: Path, entries: Mapping[str, Any]) -> None:
    """Warn that the model is built with its layers before quantization. Some libraries replace these layers."""
    given = entries.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method is not None and method not in _QUANTIZED:
        warnings.warn(
            f"{file}: the weights are quantized by {method}, but the layers before quantization are shown. "
            f"hra_fx.transform supports quantized layers of {', '.join(_QUANTIZED[:-1])} and {_QUANTIZED[-1]}.",
            HRAWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class LayerSummary:
    """A layer that a configuration adapts; `chains` is the number of experts."""

    path: str
    site: str
    d: int
    parameters: int
    r: int
    chains: int = 1

    @property
    def trained(self) -> int:
        """The number of adapter parameters."""
        return self.chains * self.d * self.r


def summarize_layer(path: str, layer: nn.Module, r: int) -> LayerSummary:
    """Describe a layer that is adapted."""
    weight = held_weight(layer)
    chains = layer.experts if isinstance(layer, ExpertsWeight) else 1
    return LayerSummary(path, describe(layer), width_of(layer), 0 if weight is None else weight.numel(), r, chains)


def show_layers(layers: Collection[LayerSummary]) -> None:
    """Print a table of layers. Layers that differ only in a number in their paths are one row."""
    columns = (
        Column("layer", is_text=True),
        Column("count"),
        Column("type", is_text=True, priority=2),
        Column("d", priority=1),
        Column("r", priority=1),
        Column("params"),
    )
    rows = []
    for group in grouped(layers, lambda layer: layer.path, lambda layer: (layer.site, layer.d, layer.r)):
        one = group.rows[0]
        parameters = sum(layer.trained for layer in group.rows)
        rows.append((group.name, str(len(group.rows)), one.site, str(one.d), str(one.r), f"{parameters:,}"))
    show_table(columns, rows)
