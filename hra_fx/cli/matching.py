"""Find the layers that a configuration would adapt, from the model's `config.json` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hra_fx.cli.building import build
from hra_fx.cli.layers import LayerSummary, summarize_layer
from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError, UnsupportedLayerError
from hra_fx.layers.target import describe, find_kind
from hra_fx.model.trainable import to_copy
from hra_fx.reporting.skipped_layers import Selection, SkippedLayer
from hra_fx.selection.check import check
from hra_fx.selection.select import select, with_head


@dataclass(frozen=True)
class Match:
    """The effect of a configuration.

    Attributes:
        model: class of the model.
        library: the library that it is from.
        parameters: number of parameters of the model.
        r: rank.
        trained: number of adapter parameters.
        trained_in_full: number of other trainable parameters (biases and modules to save).
        adapted: layers that would be adapted.
        refused: matched layers that cannot be adapted.
        missed: layers that could be adapted, but do not match.
        error: why the configuration does not fit the model; then nothing else is known.
    """

    model: str
    library: str
    parameters: int
    r: int
    trained: int = 0
    trained_in_full: int = 0
    adapted: tuple[LayerSummary, ...] = ()
    refused: tuple[SkippedLayer, ...] = ()
    missed: tuple[SkippedLayer, ...] = ()
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether `hra_fx.transform` would accept the configuration."""
        return self.error is None and not self.refused


def match_layers(path: Path, config: HRAConfig) -> Match:
    """Find the layers that a configuration matches.

    Raises:
        CheckpointError: no installed library knows the model.
    """
    model, library = build(path)
    config = with_head(model, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        chosen = select(model, config)
    except SelectionError as error:
        return Match(type(model).__name__, library, total, config.r, error=str(error))
    refused = {name: reason for name, layer in chosen.items() if (reason := _why_not(name, layer, config))}
    adapted = tuple(summarize_layer(name, layer) for name, layer in chosen.items() if name not in refused)
    copies = to_copy(model, config, chosen)
    return Match(
        type(model).__name__,
        library,
        total,
        config.r,
        trained=sum(layer.d * config.r for layer in adapted),
        trained_in_full=sum(getattr(owner, name).numel() for owner, names in copies.values() for name in names),
        adapted=adapted,
        refused=tuple(SkippedLayer(name, describe(chosen[name]), reason) for name, reason in refused.items()),
        missed=tuple(_missed(model, chosen, config)),
    )


def _why_not(name: str, layer: nn.Module, config: HRAConfig) -> str | None:
    """The reason for one layer; a check of the whole model would report only the first."""
    try:
        check(layer, {name: layer}, config)
    except UnsupportedLayerError as error:
        return str(error).removeprefix(f"{name} ({type(layer).__name__}): ")
    return None


def _missed(model: nn.Module, chosen: dict[str, nn.Module], config: HRAConfig) -> list[SkippedLayer]:
    selection = Selection(model, config)
    return [
        SkippedLayer(name, describe(layer), selection.reason(name, kind))
        for name, layer in model.named_modules()
        if name and name not in chosen and (kind := find_kind(layer)) and not selection.trains_in_full(layer)
    ]
