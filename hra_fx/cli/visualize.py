"""`hra-fx visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hra_fx.cli.options import Json
from hra_fx.cli.screen import show_json

EXAMPLES = (
    "hra-fx visualize my-model model.html",
    "hra-fx visualize my-model adapters.svg --adapter my-adapter --heat mean_angle",
    "hra-fx visualize my-model block.png --adapter my-adapter --focus model.layers.0",
)
#: The heat values that are computed from weights.
_NEED_WEIGHTS = ("weight_change", "share")


def visualize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or its config.json.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Output file: .svg, .png, .html, .mmd, .dot or .graphml."),
    ],
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
            "--heat",
            metavar="NAME",
            help="Color layers by weight_change, mean_angle, angle, rotation or share.",
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

    Options(depth, focus, heat)  # check the options before the slow step of building the model, like the output file
    picture_file(out)
    made, _ = build(model, weights=weights or heat in _NEED_WEIGHTS)
    if adapter is not None:
        load_adapter(made, adapter)
    file = draw(made, out, depth=depth, focus=focus, heat=heat)
    show_json({"file": file}) if as_json else typer.echo(file)
