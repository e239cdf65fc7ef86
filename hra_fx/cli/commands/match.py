"""`hra-fx match`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hra_fx.cli.error_output import NO, tell
from hra_fx.cli.options import Json
from hra_fx.cli.screen import Column, count, show_heading, show_json, show_lines, show_table

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
#: Of the index of a block.
_DIGITS = 5


def match(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a model, or its config.json.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", metavar="NAME", help=f"A layer, by the end of its path, or {_ALL!r}. May be given again."
        ),
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", metavar="REGEX", help="The layers whose whole path it matches.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", "-x", metavar="NAME", help="A layer to leave out. May be given again."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "-l", metavar="INDICES", help="Blocks, such as 0-3,7.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--layers-pattern", metavar="NAME", help="What the list of blocks is called.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Number of reflections, 8 if not given.")] = None,
    save: Annotated[
        list[str] | None, typer.Option("--save", metavar="NAME", help="A module to train in full. May be given again.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FOLDER",
            help="An adapter whose configuration is meant; other options replace its fields.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which layers of a model a configuration would adapt, which not, and why: a dry run.

    The model is made from its config.json, without weights. Options are fields of HRAConfig, and mean what they mean in
    PEFT. The exit code is 1 where the configuration does not fit the model.
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
        tell("does not fit", found.error, "bold red")
    if not found.fits:
        raise typer.Exit(NO)


def _targets(names: list[str] | None, regex: str | None) -> list[str] | str | None:
    if names and regex is not None:
        raise typer.BadParameter("give names (--target) or a regular expression (--regex), not both")
    if names and _ALL in names:
        if len(names) > 1:
            raise typer.BadParameter(f"{_ALL!r} means all linear layers, and stands alone", param_hint="--target")
        return _ALL
    return regex if regex is not None else names or None


def _indices(text: str) -> list[int]:
    """Numbers and ranges, both ends of which count.

    >>> _indices("0-2,7")
    [0, 1, 2, 7]
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            reason = "is no index and no range"
        elif max(len(first), len(last)) > _DIGITS:
            reason = "is of more blocks than any model has"
        elif int(last) < int(first):
            reason = "ends before it begins"
        else:
            indices += range(int(first), int(last) + 1)
            continue
        raise typer.BadParameter(f"{part!r} {reason}. Write for example 0-3,7.", param_hint="--layers")
    return indices


def _configuration(folder: Path | None, fields: dict[str, Any]) -> HRAConfig:
    from hra_fx.config import HRAConfig

    if folder is None:
        return HRAConfig(**fields)
    return dataclasses.replace(HRAConfig.from_pretrained(folder), **fields)


def _show(found: Match) -> None:
    from hra_fx.cli.grouping import grouped
    from hra_fx.reporting.columns import percent
    from hra_fx.reporting.footnotes import footnotes

    share = percent(found.trained / max(found.parameters, 1))
    show_heading(
        f"{found.model} of {found.library}",
        {
            "adapted": f"{len(found.adapted)} of "
            + count(len(found.adapted) + len(found.refused) + len(found.missed), "layer"),
            "trained": f"{count(found.trained, 'parameter')} ({share} of {found.parameters:,})",
            "trained too": f"{count(found.trained_in_full, 'parameter')} in full" if found.trained_in_full else "",
        },
    )
    columns = (
        Column("layer", words=True),
        Column("count"),
        Column("site", words=True, rank=2),
        Column("d", rank=1),
        Column("r", rank=1),
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
