"""`visualize`: write a picture of a model to a file. The file extension selects the format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hra_fx.atomic_write import output_file, write_output_file
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.html.rendering import render
from hra_fx.view.opening import Options, focused
from hra_fx.view.svg_file import render_svg
from hra_fx.view.theme import Theme


class Format(NamedTuple):
    """A file format: its description, and the function that renders a drawing."""

    words: str
    render: Callable[[Drawing, Options], str]


FORMATS: Mapping[str, Format] = {
    ".svg": Format("picture", render_svg),
    ".html": Format("interactive page", render),
}


def picture_file(path: str | os.PathLike[str]) -> Path:
    """Check the path of a picture before the work starts."""
    return output_file(path, FORMATS, listed=", ".join(f"{end} ({form.words})" for end, form in FORMATS.items()))


def rendered(file: Path, drawing: Drawing, options: Options) -> bytes:
    """Render the content of a file, whose path `picture_file` has checked, from the drawing of the whole model."""
    part = focused(drawing, options.focus)
    heatmap_of(part, options.heat)  # the same error for all formats
    return FORMATS[file.suffix.lower()].render(part, options).encode("utf-8")


def visualize(
    model: Any,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    depth: int | None = None,
    focus: str | None = None,
    heat: str | None = None,
    theme: Theme | None = None,
) -> Path:
    """Write a picture of a model: its adapted layers, how far each is rotated, and which layers were skipped.

    The file extension selects the format. `.svg` draws identical blocks once. `.html` is an interactive page.
    Every format shows each adapted layer exactly once.

    Args:
        model: a module, transformed, with PEFT's HRA, plain or folded, a `torch.fx.GraphModule` or a
            `torch.export.ExportedProgram`.
        path: the file; its folder must exist.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments. Without example inputs, modules that torch.fx
            cannot trace are drawn without edges.
        depth: number of open module levels: 0 shows the model with closed children. `None` opens as many as
            are readable.
        focus: qualified name of a module, to draw only that module and the values that enter and leave it.
        heat: color adapted layers by `"weight_change"` (`|W Q - W| / |W|` in percent, the default), `"mean_angle"`,
            `"angle"` (the largest), `"rotation"` (`|Q - I|_F`) or `"share"` (of the weight that the adapter rotates).
            The scale fits the values, and the legend shows its ends.
        theme: `"light"` or `"dark"`. By default, a picture is light, and a page uses the theme of the reader's system.

    Returns:
        The path of the file. The file is written atomically: if an error is raised, an existing file is unchanged.

    Raises:
        VisualizeError: unknown file extension, no such folder, or options that do not fit the model.
        AdapterError: `torch.export` is needed for the call, but cannot capture it.

    Example:
        >>> import hra_fx, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0", "2"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hra_fx.visualize(model, folder + "/adapters.svg", theme="dark").read_text()[:38]
        '<?xml version="1.0" encoding="UTF-8"?>'
    """
    file, options = picture_file(path), Options(depth, focus, heat, theme)
    write_output_file(file, rendered(file, drawing_of(model, example_inputs), options))
    return file
