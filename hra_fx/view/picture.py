"""`visualize`: the file that a reader opens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import fx, nn

from hra_fx.adapted import sites_of
from hra_fx.errors import VisualizeError
from hra_fx.graphing import graphs
from hra_fx.view.graph import adapted_graph
from hra_fx.view.page import Heading, page
from hra_fx.view.panels import plan
from hra_fx.view.scopes import scope_tree

#: File endings that can be written.
FORMATS = (".svg",)


def visualize(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a picture of a transformed model's adapted graph.

    Modules are boxes around what they do; blocks that look alike are drawn once, so that a deep model fits a page, and
    every adapted layer is in one of the boxes of the overview.

    Args:
        model: a model that went through `hra_fx.transform`.
        path: the file, ending in `.svg`; its folder must exist.

    Returns:
        The path of the file.

    Raises:
        VisualizeError: another file ending, no such folder, or a model without adapters.

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
            f"path: {file.name!r} ends in {file.suffix or 'nothing'!r}, and the formats that can be written are "
            f"{', '.join(FORMATS)}. Choose one of those endings."
        )
    if not file.parent.is_dir():
        raise VisualizeError(f"path: the folder {str(file.parent)!r} does not exist. Create it, or choose another one.")
    _require_adapters(model)
    file.write_text(draw(model, graphs(model)), encoding="utf-8", newline="\n")
    return file


def draw(model: nn.Module, regions: Mapping[str, fx.GraphModule]) -> str:
    """The text of the SVG picture of a model and its captured graphs.

    Args:
        model: a model that went through `hra_fx.transform`.
        regions: its captured graphs by module path.

    Raises:
        VisualizeError: a model without adapters.
    """
    _require_adapters(model)
    name = type(model).__name__
    tree = scope_tree(adapted_graph(model, regions), name)
    return page(plan(tree), Heading(f"{name} with HRA", facts(model, regions)))


def facts(model: nn.Module, regions: Mapping[str, fx.GraphModule]) -> str:
    """One line: how many sites, their ranks and parameters, how the model was captured."""
    boxes = [layer.hra_u for layer in sites_of(model).values()]
    ranks = sorted({sum(box[name].shape[1] for name in box.active) for box in boxes})
    adapter = sum(parameter.numel() for box in boxes for parameter in box.parameters())
    base = sum(parameter.numel() for parameter in model.parameters()) - adapter
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    alone = len(regions.keys() & sites_of(model).keys())
    parts = (_number(len(regions) - alone, "captured region"), f"{_number(alone, 'layer')} alone")
    captured = "captured whole" if "" in regions else ", ".join(parts)
    words = f"{_number(len(boxes), 'adapted layer')} · r = {span} · {adapter:,} adapter parameters"
    return f"{words} ({adapter / max(base, 1):.2%} of {base:,}) · {captured}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _require_adapters(model: nn.Module) -> None:
    if not sites_of(model):
        raise VisualizeError(
            f"model: {type(model).__name__} has no adapted layer, so there is nothing to draw. "
            "Call hra_fx.transform(model, config) first."
        )
