"""`visualize`: the file that a reader opens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hra_fx.atomic_write import put_whole
from hra_fx.view.drawing import drawing_of
from hra_fx.view.focus import focused
from hra_fx.view.formats import picture_file, renderer
from hra_fx.view.heatmap import heatmap_of
from hra_fx.view.options import Options


def visualize(
    model: Any,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    depth: int | None = None,
    focus: str | None = None,
    heat: str | None = None,
) -> Path:
    """Write a picture of a model: where its reflections are, what they did, and which layers were skipped.

    Modules are boxes around what they do. In `.svg`, `.png` and `.mmd` blocks that look alike are drawn once, so that a
    deep model fits a page; `.html` is a page to explore; `.dot`, `.graphml` and `.json` (Model Explorer) have every box
    by itself. Every adapted layer is in each of them exactly once.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        path: the file; its ending chooses the format, and its folder must exist.
        example_inputs: those of one call: for shapes, and for a whole graph by TorchDynamo where fx has none.
        depth: how many levels of modules are opened: 0 for the model with its children closed, 1 to open those, and so
            on. `None` leaves it to the format: what fits a page in pictures, everything in files for other programs.
        focus: qualified name of a module to be drawn by itself, with what enters and leaves it.
        heat: color adapted layers by how far they are rotated: `"mean_angle"` (of the planes that turn), `"angle"` (the
            largest), `"rotation"` (`|Q - I|_F`) or `"share"` (of the weight, that is rotated).

    Returns:
        The path of the file, which was written whole; where anything is refused, what was there is kept.

    Raises:
        VisualizeError: another file ending, no such folder, a library that is not installed, options that do not fit
            the model, or a graph that the format cannot hold.
        AdapterError: the model does not run on the example inputs, or TorchDynamo cannot record the call.

    Example:
        >>> import hra_fx, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0", "2"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hra_fx.visualize(model, folder + "/adapters.svg", heat="mean_angle").read_text()[:38]
        '<?xml version="1.0" encoding="UTF-8"?>'
    """
    file, options = picture_file(path), Options(depth, focus, heat)
    render = renderer(file)
    drawing = drawing_of(model, example_inputs)
    heatmap_of(focused(drawing, options.focus), options.heat)  # what does not fit is refused alike for all formats
    content = render(drawing, options)
    put_whole(file, content if isinstance(content, bytes) else content.encode("utf-8"))
    return file
