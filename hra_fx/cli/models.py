"""The commands that build a model from its `config.json`: `hra-fx match` and `hra-fx visualize`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hra_fx.cli.screen import CHECK_FAILED, Json, print_message, show_heading, show_json, show_lines
from hra_fx.errors import SelectionError, UnsupportedLayerError
from hra_fx.reporting.words import counted

if TYPE_CHECKING:
    from hra_fx.config import HRAConfig

#: The heat values that are computed from weights.
_NEED_WEIGHTS = ("weight_change", "share")
_ALL = "all-linear"


def match(
    path: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or its config.json.")],
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
    found = _summarize(path, _configuration(config, given))
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


def _summarize(path: Path, config: HRAConfig) -> dict[str, Any]:
    """Compute what `--json` prints: the result of `hra_fx.report` after `hra_fx.transform` of a model without weights.

    `trained` is the number of adapter parameters, and `trained_in_full` is the number of other trainable parameters
    (biases and modules to save). `adapted` are the layers that would be adapted, `missed` are the other layers,
    `trained_layers` would be trained in full, and `missed_parameters` are 3-D parameters (experts) that would not be
    adapted. If there is an `error`, the configuration does not fit the model, and the other fields are empty.
    """
    from hra_fx.api.transform import transform
    from hra_fx.cli.building import build, summarize_layer
    from hra_fx.model.state import adapted_layers
    from hra_fx.reporting.report import report

    model, library = build(path)
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "library": library,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "r": config.r,
        **dict.fromkeys(("trained", "trained_in_full"), 0),
        **dict.fromkeys(("adapted", "missed", "trained_layers", "missed_parameters"), ()),
        "error": None,
    }
    try:
        rows = report(transform(model, config))
    except (SelectionError, UnsupportedLayerError) as error:
        return found | {"error": str(error)}
    trained = sum(row.parameters for row in rows)
    layers = adapted_layers(model)
    return found | {
        "trained": trained,
        "trained_in_full": sum(p.numel() for p in model.parameters() if p.requires_grad) - trained,
        "adapted": [summarize_layer(row.path, layers[row.path], row.r) for row in rows],
        "missed": rows.skipped,
        "trained_layers": rows.trained_in_full,
        "missed_parameters": rows.skipped_parameters,
    }


def _show(found: dict[str, Any]) -> None:
    from hra_fx.cli.building import show_layers
    from hra_fx.reporting.columns import footnotes
    from hra_fx.reporting.heat import with_unit

    adapted, in_full = found["adapted"], found["trained_in_full"]
    share = with_unit(100 * found["trained"] / found["parameters"], "%")
    show_heading(
        f"{found['model']} ({found['library']})",
        {
            "adapted": f"{len(adapted)} of {counted(len(adapted) + len(found['missed']), 'layer')}",
            "trainable": f"{counted(found['trained'], 'parameter')} ({share} of {found['parameters']:,})",
            "also trained": f"{counted(in_full, 'parameter')} in full" if in_full else "",
        },
    )
    show_layers(adapted)
    for title, lines in footnotes((), found["missed"], found["trained_layers"], found["missed_parameters"]).items():
        show_lines(title, lines)


def visualize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or its config.json.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output file: .svg or .html.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="FOLDER", help="An adapter to show in the model.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", "-d", help="Number of module levels to expand; 0 collapses all.")
    ] = None,
    focus: Annotated[str | None, typer.Option("--focus", "-f", metavar="MODULE", help="Draw this module only.")] = None,
    heat: Annotated[
        str | None,
        typer.Option(
            "--heat", metavar="NAME", help="Color layers by weight_change, mean_angle, angle, rotation or share."
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the weights. Implied by --heat weight_change and share.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw a model, optionally with an adapter. The extension of OUT selects the format.

    The model is built from its config.json, without weights if possible.
    """
    from hra_fx.api.load import load_adapter
    from hra_fx.cli.building import build
    from hra_fx.view.opening import Options
    from hra_fx.view.picture import picture_file, visualize as draw

    # Check the options and the output file before the slow step of building the model.
    Options(depth, focus, heat)
    picture_file(out)
    made, _ = build(model, weights=weights or heat in _NEED_WEIGHTS)
    if adapter is not None:
        load_adapter(made, adapter)
    file = draw(made, out, depth=depth, focus=focus, heat=heat)
    show_json({"file": file}) if as_json else typer.echo(file)
