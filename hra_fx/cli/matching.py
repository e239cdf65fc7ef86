"""What a configuration would do with a model, found out from the model's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hra_fx.cli.building import build
from hra_fx.cli.inspect_model import SiteLook, site_look
from hra_fx.config import HRAConfig
from hra_fx.errors import SelectionError, UnsupportedLayerError
from hra_fx.layers.target import describe, find_kind
from hra_fx.model.trainable import to_copy
from hra_fx.reporting.skipped_layers import Selection, SkippedLayer
from hra_fx.selection.check import check
from hra_fx.selection.select import select, with_head


@dataclass(frozen=True)
class Match:
    """What would come of a configuration.

    Attributes:
        model: class of the model.
        library: whose it is.
        parameters: how many numbers the model holds.
        r: how many vectors each adapted layer would get.
        trained: how many numbers of theirs would be trained.
        trained_in_full: how many besides, as biases and modules to save.
        adapted: the layers that would be adapted.
        refused: those that are meant, and cannot be.
        missed: those that could be, and are not meant.
        error: why the configuration does not fit the model as a whole; then nothing else is known.
    """

    model: str
    library: str
    parameters: int
    r: int
    trained: int = 0
    trained_in_full: int = 0
    adapted: tuple[SiteLook, ...] = ()
    refused: tuple[SkippedLayer, ...] = ()
    missed: tuple[SkippedLayer, ...] = ()
    error: str | None = None

    @property
    def fits(self) -> bool:
        """Whether `hra_fx.transform` would take it."""
        return self.error is None and not self.refused


def match_layers(path: Path, config: HRAConfig) -> Match:
    """Ask which layers of a model a configuration means.

    Raises:
        CheckpointError: no installed library knows the model.
    """
    built = build(path)
    model = built.model
    config = with_head(model, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        chosen = select(model, config)
    except SelectionError as error:
        return Match(type(model).__name__, built.library, total, config.r, error=str(error))
    refused = {name: reason for name, layer in chosen.items() if (reason := _why_not(name, layer, config))}
    adapted = tuple(site_look(name, layer) for name, layer in chosen.items() if name not in refused)
    copies = to_copy(model, config, chosen)
    return Match(
        type(model).__name__,
        built.library,
        total,
        config.r,
        trained=sum(layer.d * config.r for layer in adapted),
        trained_in_full=sum(getattr(owner, name).numel() for owner, names in copies.values() for name in names),
        adapted=adapted,
        refused=tuple(SkippedLayer(name, describe(chosen[name]), reason) for name, reason in refused.items()),
        missed=tuple(_missed(model, chosen, config)),
    )


def _why_not(name: str, layer: nn.Module, config: HRAConfig) -> str | None:
    """Asked of each layer by itself, for asked of the model it is said of the first one only."""
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
