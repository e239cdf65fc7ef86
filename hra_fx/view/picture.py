"""`visualize`: write a picture of a model to a file. The file extension selects the format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hra_fx.atomic_write import atomic_write
from hra_fx.errors import VisualizeError
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.opening import Opening, opening
from hra_fx.view.page import render_page
from hra_fx.view.scopes import scope_tree
from hra_fx.view.svg_file import render_svg
from hra_fx.view.tree import Scope

FORMATS: Mapping[str, Callable[[Drawing, Scope, Opening], str]] = {".svg": render_svg, ".html": render_page}


def visualize(
    model: Any,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    depth: int | None = None,
    focus: str | None = None,
) -> Path:
    """Write a picture of a model: its adapted layers, how much each is changed, and which layers were skipped.

    The file extension selects the format. `.svg` is one picture. `.html` is a page that needs no network: a picture of
    the model, one of each module that is closed in another picture, and the report. Identical blocks are drawn once,
    and each adapted layer exactly once. Both formats follow the reader's light or dark theme.

    Colors show how much each weight changes, `|W Q - W| / |W|`. Values that do not depend on the inputs are not drawn.

    Args:
        model: a module, transformed, plain or folded, or a `torch.fx.GraphModule`.
        path: the file; its folder must exist.
        example_inputs: inputs of one call, for shapes. `torch.export` captures this call if torch.fx cannot trace
            the whole model, or if the call passes optional arguments. Without example inputs, modules that torch.fx
            cannot trace are drawn without edges.
        depth: number of open module levels: 0 shows the model with closed children. `None` opens as many as
            are readable.
        focus: qualified name of a module, to draw only that module.

    Returns:
        The path of the file. The file is written atomically: if an error is raised, an existing file is unchanged.

    Raises:
        VisualizeError: unknown file extension or module, or a model of another type.
        AdapterError: `example_inputs` is not a tensor, a tuple or a dict.
        OSError: the file cannot be written.

    Example:
        >>> import hra_fx, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0", "2"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hra_fx.visualize(model, folder + "/adapters.svg").read_text()[:38]
        '<?xml version="1.0" encoding="UTF-8"?>'
    """
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise VisualizeError(
            f"path: unsupported file extension {file.suffix!r} in {file.name!r}. Use one of {', '.join(FORMATS)}."
        )
    drawing = drawing_of(model, example_inputs)
    root = scope_tree(drawing.picture, type(model).__name__, focus or "")
    text = FORMATS[file.suffix.lower()](drawing, root, opening(root, depth))
    atomic_write(file.resolve(), text.encode("utf-8"))  # the file that a symbolic link points to
    return file
