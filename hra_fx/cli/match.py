"""`hra-fx match`: find the layers that a configuration would adapt, from the model's `config.json` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hra_fx.cli.error_output import CHECK_FAILED, print_message
from hra_fx.cli.layers import grouped, summarize_layer
from hra_fx.cli.options import Json
from hra_fx.cli.screen import count, show_heading, show_json, show_lines, show_table
from hra_fx.errors import SelectionError
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from torch import nn

    from hra_fx.cli.layers import LayerSummary
    from hra_fx.config import HRAConfig
    from hra_fx.reporting.skipped_layers import SkippedLayer, SkippedParameter

EXAMPLES = (
    "hra-fx match my-model",
    "hra-fx match my-model --target q_proj --target v_proj --layers 0-3,7",
    "hra-fx match my-model --target all-linear --exclude lm_head --rank 16",
    "hra-fx match my-model --regex '.*self_attn\\.[qv]_proj'",
    "hra-fx match my-model --config my-adapter",
)
_ALL = "all-linear"
#: Most digits of a block index.
_DIGITS = 5


@dataclasses.dataclass(frozen=True)
class Match:
    """The effect of a configuration.

    Attributes:
        model: class of the model.
        library: the library that it is from.
        parameters: number of parameters of the model.
        r: rank of layers that `rank_pattern` does not match.
        trained: number of adapter parameters.
        trained_in_full: number of other trainable parameters (biases and modules to save).
        adapted: layers that would be adapted.
        refused: matched layers that cannot be adapted.
        missed: layers that could be adapted, but do not match.
        trained_layers: paths of the layers that would be trained in full.
        missed_parameters: 3-D parameters (experts), which would not be adapted.
        error: why the configuration does not fit the model; then nothing else is known.
    """

    model: str
    library: str
    parameters: int
    r: int
    trained: int = 0
    trained_in_full: int = 0
    adapted: Sequence[LayerSummary] = ()
    refused: Sequence[SkippedLayer] = ()
    missed: Sequence[SkippedLayer] = ()
    trained_layers: Sequence[str] = ()
    missed_parameters: Sequence[SkippedParameter] = ()
    error: str | None = None


def match(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a model, or its config.json.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", metavar="NAME", help=f"A layer, by the end of its path, or {_ALL!r}. Repeatable."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", metavar="REGEX", help="Layers whose full path matches.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--target-parameter", metavar="NAME", help="Experts in a 3-D parameter, by the end of its path. Repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", metavar="NAME", help="A layer to exclude. Repeatable."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "-l", metavar="INDICES", help="Blocks, such as 0-3,7.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--layers-pattern", metavar="NAME", help="Name of the list of blocks.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Number of reflections. Default: 8.")] = None,
    save: Annotated[
        list[str] | None, typer.Option("--save", metavar="NAME", help="A module to train in full. Repeatable.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FOLDER",
            help="Use the configuration of an adapter; other options override its fields.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which layers of a model a configuration would adapt, and why others are skipped (dry run).

    The model is built from its config.json, without weights. The options are fields of HRAConfig, as in PEFT. The exit
    code is 1 if the configuration does not match the model.
    """
    fields: dict[str, Any] = {
        "target_modules": _targets(target, regex),
        "target_parameters": parameter,
        "exclude_modules": exclude,
        "layers_to_transform": None if layers is None else _indices(layers),
        "layers_pattern": pattern,
        "r": rank,
        "modules_to_save": save,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    found = _match_layers(path, _configuration(config, given))
    if as_json:
        show_json(found)
    elif found.error is None:
        _show(found)
    if found.error is not None:
        print_message("does not match", found.error, "bold red")
    if found.error is not None or found.refused:
        raise typer.Exit(CHECK_FAILED)


def _targets(names: list[str] | None, regex: str | None) -> list[str] | str | None:
    if names and regex is not None:
        raise typer.BadParameter("use either --target or --regex, not both")
    if names and _ALL in names:
        if len(names) > 1:
            raise typer.BadParameter(f"{_ALL!r} cannot be combined with other names", param_hint="--target")
        return _ALL
    return regex if regex is not None else names or None


def _indices(text: str) -> list[int]:
    """Parse numbers and inclusive ranges.

    >>> _indices("0-2,7")
    [0, 1, 2, 7]
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            reason = "must be an index or a range"
        elif max(len(first), len(last)) > _DIGITS:
            reason = "is too large"
        elif int(last) < int(first):
            reason = "ends before it starts"
        else:
            indices += range(int(first), int(last) + 1)
            continue
        raise typer.BadParameter(f"{part!r} {reason}, for example 0-3,7.", param_hint="--layers")
    return indices


def _configuration(folder: Path | None, fields: dict[str, Any]) -> HRAConfig:
    from hra_fx.config import HRAConfig

    if folder is None:
        return HRAConfig(**fields)
    return dataclasses.replace(HRAConfig.from_pretrained(folder), **fields)


def _match_layers(path: Path, config: HRAConfig) -> Match:
    from hra_fx.cli.building import build
    from hra_fx.layers.target import describe, weight_entry
    from hra_fx.model.trainable import to_copy
    from hra_fx.reporting.skipped_layers import SkippedLayer, skipped_parameters
    from hra_fx.selection.check import layer_problem
    from hra_fx.selection.select import select, with_head

    model, library = build(path)
    config = with_head(model, config)
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        chosen = select(model, config)
    except SelectionError as error:
        return Match(type(model).__name__, library, total, config.r, error=str(error))
    refused = {name: reason for name, layer in chosen.items() if (reason := layer_problem(name, layer, config))}
    adapted = [
        summarize_layer(name, layer, config.rank_of(name)) for name, layer in chosen.items() if name not in refused
    ]
    copies = to_copy(model, config, chosen)
    known = {f"{path}.{name}" for path, (_, names) in copies.items() for name in names}
    known |= {weight_entry(name, layer) for name, layer in chosen.items()}
    missed, trained_layers = _not_adapted(model, chosen, config)
    return Match(
        type(model).__name__,
        library,
        total,
        config.r,
        trained=sum(layer.trained for layer in adapted),
        trained_in_full=sum(getattr(owner, name).numel() for owner, names in copies.values() for name in names),
        adapted=adapted,
        refused=[SkippedLayer(name, describe(chosen[name]), f"{reason}.") for name, reason in refused.items()],
        missed=missed,
        trained_layers=trained_layers,
        missed_parameters=[p for p in skipped_parameters(model.requires_grad_(False)) if p.path not in known],
    )


def _not_adapted(
    model: nn.Module, chosen: dict[str, nn.Module], config: HRAConfig
) -> tuple[list[SkippedLayer], list[str]]:
    """The layers that would not be adapted, and those that would be trained in full."""
    from hra_fx.layers.target import describe, find_kind
    from hra_fx.reporting.skipped_layers import Selection, SkippedLayer

    selection = Selection(model, config)
    others = {name: layer for name, layer in model.named_modules() if name and name not in chosen}
    trained = [name for name, layer in others.items() if selection.trains_in_full(layer)]
    missed = [
        SkippedLayer(name, describe(layer), selection.reason(name, kind))
        for name, layer in others.items()
        if (kind := find_kind(layer)) and name not in trained
    ]
    return missed, trained


def _show(found: Match) -> None:
    from hra_fx.reporting.columns import percent
    from hra_fx.reporting.footnotes import footnotes

    share = percent(found.trained / max(found.parameters, 1))
    show_heading(
        f"{found.model} ({found.library})",
        {
            "adapted": f"{len(found.adapted)} of "
            + count(len(found.adapted) + len(found.refused) + len(found.missed), "layer"),
            "trainable": f"{count(found.trained, 'parameter')} ({share} of {found.parameters:,})",
            "also trained": f"{count(found.trained_in_full, 'parameter')} in full" if found.trained_in_full else "",
        },
    )
    columns = (
        Column("layer", is_text=True),
        Column("count"),
        Column("type", is_text=True, priority=2),
        Column("d", priority=1),
        Column("r", priority=1),
        Column("params"),
    )
    if found.adapted:
        groups = grouped(found.adapted)
        rows = [(g.path, str(g.count), g.site, str(g.d), str(g.r), f"{g.trained:,}") for g in groups]
        show_table(columns, rows)
    if found.refused:
        show_lines(
            f"Cannot be adapted: {count(len(found.refused), 'layer')}", [f"{m.path}: {m.reason}" for m in found.refused]
        )
    for footnote in footnotes((), found.missed, found.trained_layers, found.missed_parameters):
        show_lines(footnote.heading, footnote.lines)
