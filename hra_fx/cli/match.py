"""`hra-fx match`: the layers of a model that a configuration adapts."""

from __future__ import annotations

import dataclasses
import re
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Option

from hra_fx.cli.screen import (
    CHECK_FAILED,
    Json,
    TrustRemoteCode,
    print_message,
    show_heading,
    show_json,
    show_lines,
    show_table,
)
from hra_fx.errors import SelectionError, UnsupportedLayerError
from hra_fx.reporting.words import counted

if TYPE_CHECKING:
    from hra_fx.config import HRAConfig

_ALL = "all-linear"


#: The options that may be repeated.
Names: TypeAlias = list[str] | None


def match(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or its config.json.")],
    target: Annotated[Names, Option("-t", "--target", metavar="NAME", help=f"End of a path, or {_ALL}.")] = None,
    regex: Annotated[str | None, Option(metavar="REGEX", help="Layers whose full path matches.")] = None,
    target_parameter: Annotated[Names, Option(metavar="NAME", help="End of the path of a 3-D parameter.")] = None,
    exclude: Annotated[Names, Option("-x", "--exclude", metavar="NAME", help="A layer to exclude.")] = None,
    layers: Annotated[str | None, Option("-l", "--layers", metavar="INDICES", help="Blocks, such as 0-3,7.")] = None,
    layers_pattern: Annotated[str | None, Option(metavar="NAME", help="Name of the list of blocks.")] = None,
    rank: Annotated[int | None, Option("-r", "--rank", help="Number of reflections. Default: 8.")] = None,
    save: Annotated[Names, Option(metavar="NAME", help="A module to train in full.")] = None,
    config: Annotated[Path | None, Option("-c", "--config", metavar="FOLDER", help="Start from an adapter.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show which layers of a model a configuration would adapt, and why others are skipped (dry run).

    The model is built from its config.json, without weights. The options are fields of HRAConfig, as in PEFT; those
    with a NAME are repeatable. They override the fields of --config. The exit code is 1 if the configuration does not
    match the model.
    """
    fields: dict[str, Any] = {
        "target_modules": _targets(target, regex),
        "target_parameters": target_parameter,
        "exclude_modules": exclude,
        "layers_to_transform": None if layers is None else _indices(layers),
        "layers_pattern": layers_pattern,
        "r": rank,
        "modules_to_save": save,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    found = _summarize(path, _configuration(config, given), trust_remote_code=trust_remote_code)
    if as_json:
        show_json(found)
    elif found["error"] is None:
        _show(found)
    if found["error"] is not None:
        print_message("does not match", found["error"], "bold red")
        raise typer.Exit(CHECK_FAILED)


def _targets(names: list[str] | None, regex: str | None) -> list[str] | str | None:
    if names and regex is not None:
        raise typer.BadParameter("use either --target or --regex, not both")
    if names == [_ALL]:
        return _ALL
    return regex if regex is not None else names or None


def _indices(text: str) -> list[int]:
    """Parse numbers and inclusive ranges, such as "0-2,7"."""
    indices: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first:
            raise typer.BadParameter(f"{part!r} must be an index or a range, for example 0-3,7.", param_hint="--layers")
        indices += range(first, last + 1)
    return indices


def _configuration(folder: Path | None, fields: dict[str, Any]) -> HRAConfig:
    from hra_fx.config import HRAConfig

    if folder is None:
        return HRAConfig(**fields)
    # A saved configuration has inference_mode=True, so nothing would be trained.
    return dataclasses.replace(HRAConfig.from_pretrained(folder), inference_mode=False, **fields)


def _summarize(path: Path, config: HRAConfig, *, trust_remote_code: bool) -> dict[str, Any]:
    """Compute what `--json` prints: the result of `hra_fx.report` after `hra_fx.transform` of a model without weights.

    `trained` is the number of adapter parameters, in total and of each layer; `trained_in_full` is the number of other
    trainable parameters (biases and modules to save). `adapted` are the layers that would be adapted, `missed` are the
    other layers, `trained_layers` would be trained in full, and `missed_parameters` are 3-D parameters (experts) that
    would not be adapted. If there is an `error`, the configuration does not fit the model, and these are empty.
    """
    from hra_fx.api.transform import transform
    from hra_fx.checkpoint.model_folder import build_model
    from hra_fx.reporting.report import Report, report

    model, library = build_model(path, trust_remote_code=trust_remote_code)
    found = {
        "model": type(model).__name__,
        "library": library,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "r": config.r,
    }
    try:
        rows, error = report(transform(model, config)), None
    except (SelectionError, UnsupportedLayerError) as refusal:
        rows, error = Report(()), str(refusal)
    trained = sum(row.parameters for row in rows)
    trainable = 0 if error else sum(p.numel() for p in model.parameters() if p.requires_grad)
    fields = {"path": "path", "site": "layer_type", "d": "d", "r": "r", "trained": "parameters"}
    return found | {
        "trained": trained,
        "trained_in_full": trainable - trained,
        "adapted": [{name: getattr(row, field) for name, field in fields.items()} for row in rows],
        "missed": rows.skipped,
        "trained_layers": rows.trained_in_full,
        "missed_parameters": rows.skipped_parameters,
        "error": error,
    }


def _show(found: dict[str, Any]) -> None:
    from hra_fx.reporting.columns import footnotes, grouped
    from hra_fx.reporting.table import Column

    adapted, in_full = found["adapted"], found["trained_in_full"]
    show_heading(
        f"{found['model']} ({found['library']})",
        {
            "adapted": f"{len(adapted)} of {counted(len(adapted) + len(found['missed']), 'layer')}",
            "trainable": f"{counted(found['trained'], 'parameter')} "
            f"({found['trained'] / found['parameters']:.2%} of {found['parameters']:,})",
            "also trained": f"{counted(in_full, 'parameter')} in full" if in_full else "",
        },
    )
    rows = []
    for group in grouped(adapted, itemgetter("path"), itemgetter("site", "d", "r")):
        one, trained = group.rows[0], sum(layer["trained"] for layer in group.rows)
        texts = (str(len(group.rows)), one["site"], str(one["d"]), str(one["r"]), f"{trained:,}")
        rows.append((group.name, *texts))
    show_table([Column("layer", True), Column("count"), Column("type", True), *map(Column, ("d", "r", "params"))], rows)
    for title, lines in footnotes((), found["missed"], found["trained_layers"], found["missed_parameters"]).items():
        show_lines(title, lines)
