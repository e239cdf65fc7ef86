"""Draw a model on disk, with or without an adapter."""

from __future__ import annotations

from pathlib import Path

from hra_fx.api.load import load_adapter
from hra_fx.cli.building import build, load
from hra_fx.view.formats import picture_file
from hra_fx.view.options import Options
from hra_fx.view.picture import visualize

#: The heat value that is computed from weights.
_NEEDS_WEIGHTS = "share"


def draw(path: Path, out: Path, adapter: str | None, options: Options, *, weights: bool) -> Path:
    """Draw a model, from `config.json` alone if that is enough.

    Args:
        path: the model's folder, or its `config.json`.
        out: the output file.
        adapter: folder of an adapter.
        options: drawing options.
        weights: whether to load the weights even if they are not needed.

    Raises:
        HRAError: see `visualize` and `load_adapter`; or no installed library knows the model.
    """
    picture_file(out)  # before the slow step of building the model
    built = load(path) if weights or options.heat == _NEEDS_WEIGHTS else build(path)
    if adapter is not None:
        load_adapter(built.model, adapter)
    return visualize(built.model, out, depth=options.depth, focus=options.focus, heat=options.heat)
