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


def visualize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a model, or its config.json.")],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="File to be written: .svg, .png, .html, .mmd, .dot, .graphml or .json."),
    ],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="FOLDER", help="An adapter to be shown in it.")
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", "-d", help="How many levels of modules are opened; 0 closes all.")
    ] = None,
    focus: Annotated[str | None, typer.Option("--focus", "-f", metavar="MODULE", help="Draw this module only.")] = None,
    heat: Annotated[
        str | None,
        typer.Option("--heat", metavar="NAME", help="Colour layers by mean_angle, angle, rotation or share."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load the weights. Done without being asked for --heat share.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw a model, and where an adapter is in it; the ending of OUT chooses the format.

    The model is made from its config.json, without weights, where that is enough.
    """
    from hra_fx.cli.draw import draw
    from hra_fx.view.options import Options

    file = draw(model, out, adapter, Options(depth, focus, heat), weights=weights)
    show_json({"file": file}) if as_json else typer.echo(file)
