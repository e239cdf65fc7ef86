"""`hra-fx match`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hra_fx.cli.error_output import CHECK_FAILED, print_message
from hra_fx.cli.options import Json
from hra_fx.cli.screen import count, show_heading, show_json, show_lines, show_table
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from hra_fx.cli.matching import Match
    from hra_fx.config import HRAConfig

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
        "exclude_modules": exclude,
        "layers_to_transform": None if layers is None else _indices(layers),
        "layers_pattern": pattern,
        "r": rank,
        "modules_to_save": save,
    }
    from hra_fx.cli.matching import match_layers

    found = match_layers(
        path, _configuration(config, {name: given for name, given in fields.items() if given is not None})
    )
    if as_json:
        show_json(found)
    elif found.error is None:
        _show(found)
    if found.error is not None:
        print_message("does not match", found.error, "bold red")
    if not found.fits:
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


def _show(found: Match) -> None:
    from hra_fx.cli.layers import grouped
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
        rows = [(g.path, str(g.count), g.site, str(g.d), str(found.r), f"{g.count * g.d * found.r:,}") for g in groups]
        show_table(columns, rows)
    if found.refused:
        show_lines(
            f"Cannot be adapted: {count(len(found.refused), 'layer')}", [f"{m.path}: {m.reason}" for m in found.refused]
        )
    for footnote in footnotes((), found.missed):
        show_lines(footnote.heading, footnote.lines)
