"""`visualize`: writes a picture of a model to a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hra_fx.atomic_write import write_output_file
from hra_fx.view.drawing import drawing_of
from hra_fx.view.formats import picture_file, rendered
from hra_fx.view.options import Options
from hra_fx.view.theme import Theme


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

    The file ending selects the format. `.svg`, `.png` and `.mmd` (Mermaid) draw identical blocks once. `.html` is an
    interactive page. `.dot` and `.graphml` contain every box. Every adapted layer is in each of them exactly once.

    Args:
        model: a module, transformed, plain or folded, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        path: the file; its folder must exist.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call where torch.fx cannot trace
            the whole model, or where the call gives optional arguments. Without them, modules that torch.fx cannot
            trace are drawn without edges.
        depth: number of module levels that are open: 0 shows the model with its children closed. `None` opens as
            many as stay readable in pictures, and all in files for other programs.
        focus: qualified name of a module, to draw only that module and the values that enter and leave it.
        heat: color adapted layers by `"weight_change"` (`|W Q - W| / |W|` in percent, the default), `"mean_angle"`,
            `"angle"` (the largest), `"rotation"` (`|Q - I|_F`) or `"share"` (of the weight that the adapter rotates).
            The scale fits the values, and the legend shows its ends.
        theme: `"light"` (the default) or `"dark"` for `.svg` and `.png`. Without it, a `.html` page has the theme of
            the reader's system.

    Returns:
        The path of the file. The file is written as a whole; if an error is raised, an existing file is unchanged.

    Raises:
        VisualizeError: unknown file ending, no such folder, a library that is not installed, options that do not fit
            the model, or a graph that is too large for the format.
        AdapterError: `torch.export` is needed for the call, and cannot capture it.

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
