"""A picture of a model that is on disk, with an adapter or without."""

from __future__ import annotations

from pathlib import Path

from hra_fx.api.load import load_adapter
from hra_fx.cli.building import build, load
from hra_fx.view.formats import picture_file
from hra_fx.view.options import Options
from hra_fx.view.picture import visualize

#: The heat that is of weights, and not of reflections alone.
_OF_WEIGHTS = "share"


def draw(path: Path, out: Path, adapter: str | None, options: Options, *, weights: bool) -> Path:
    """Draw it, from `config.json` where that is enough.

    Args:
        path: the model's folder, or its `config.json`.
        out: the file to be written.
        adapter: the folder of an adapter.
        options: of the picture.
        weights: load the weights in any case.

    Raises:
        HRAError: as `visualize` and `load_adapter`; or no library knows the model.
    """
    picture_file(out)  # refused before seconds go into a model
    built = load(path) if weights or options.heat == _OF_WEIGHTS else build(path)
    if adapter is not None:
        load_adapter(built.model, adapter)
    return visualize(built.model, out, depth=options.depth, focus=options.focus, heat=options.heat)
