"""`hra-fx inspect`: show an adapter without its base model."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from hra_fx.cli.screen import Json, show


def inspect(
    path: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.")],
    as_json: Json = False,
) -> None:
    """Show an adapter: its layers, ranks, parameters and rotation angles, and what its configuration sets."""
    from hra_fx.checkpoint.read import read_adapter
    from hra_fx.config import HRAConfig
    from hra_fx.functional.householder import working_dtype
    from hra_fx.layers.target import REFLECTION
    from hra_fx.reporting.report import Report
    from hra_fx.reporting.row import Row, measured_fields

    files = read_adapter(path)
    config, chains = files.config.to_dict(), files.chains
    usual = HRAConfig(inference_mode=True, auto_mapping=files.config.auto_mapping).to_dict()
    dtype = next(tensor.dtype for key, tensor in files.tensors.items() if key.endswith(f".{REFLECTION}"))
    rows = []
    for layer, chain in chains.items():
        r = files.config.rank_of(layer)
        # Use the file's precision, so that rounding errors of vectors that cancel are not shown as angles.
        measured = measured_fields(chain.to(working_dtype(dtype)), None)
        rows.append(Row(layer, "", "default", True, chain.shape[-2], r, math.prod(chain.shape[:-1]) * r, **measured))  # type: ignore[arg-type]
    facts = {
        "folder": str(files.file.parent),
        **{name: value for name, value in config.items() if value != usual.get(name)},
        "dtype": str(dtype).removeprefix("torch."),
        "also_saved": files.others,
    }
    show(facts, Report(tuple(rows)), as_json=as_json)
