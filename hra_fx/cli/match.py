"""`hra-fx match`: the layers of a model that a configuration adapts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer import Option

from hra_fx.cli.screen import CHECK_FAILED, Json, print_message, show
from hra_fx.errors import SelectionError, UnsupportedLayerError

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
    from hra_fx.api.transform import transform
    from hra_fx.checkpoint.model_folder import build_model
    from hra_fx.reporting.report import Report, report

    settings = _configuration(config, given)
    model, library = build_model(path)
    facts: dict[str, Any] = {"model": type(model).__name__, "library": library}
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    try:
        found = report(transform(model, settings))
    except (SelectionError, UnsupportedLayerError) as refusal:
        if as_json:
            show(facts | {"trainable": 0, "error": str(refusal)}, Report(()), as_json=True)
        print_message("does not match", str(refusal), "bold red")
        raise typer.Exit(CHECK_FAILED) from refusal
    facts["trainable"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    show(facts | {"error": None}, found, as_json=as_json)


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
