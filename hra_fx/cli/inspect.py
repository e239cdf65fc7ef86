"""`hra-fx inspect`: show an adapter without its base model."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from hra_fx.cli.screen import Json, show_heading, show_json, show_table
from hra_fx.reporting.words import counted, low_to_high
from hra_fx.selection.suggestions import some_of


def inspect(
    path: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its name on the Hub.")],
    as_json: Json = False,
) -> None:
    """Show an adapter: its layers, ranks, parameters and rotation angles."""
    summary = _summarize_adapter(path)
    show_json(summary) if as_json else _show_adapter(summary)


def _summarize_adapter(source: str) -> dict[str, Any]:
    """The output of `--json`: facts of the files, and rows as in `hra_fx.report`, without what needs the base model."""
    from hra_fx.checkpoint.adapter import read_adapter
    from hra_fx.functional.householder import working_dtype
    from hra_fx.layers.target import REFLECTION
    from hra_fx.reporting.row import Row, measured_fields

    files = read_adapter(source)
    config, chains = files.config, files.chains
    dtype = next(tensor.dtype for key, tensor in files.tensors.items() if key.endswith(f".{REFLECTION}"))
    rows = []
    for path, chain in chains.items():
        r = config.rank_of(path)
        # Use the file's precision, so that rounding errors of vectors that cancel are not shown as angles.
        measured = measured_fields(chain.to(working_dtype(dtype)), None)
        rows.append(Row(path, "", "", True, chain.shape[-2], r, math.prod(chain.shape[:-1]) * r, **measured))
    targets = config.target_modules
    return {
        "folder": files.file.parent,
        "base_model": str(config.base_model_name_or_path) if config.base_model_name_or_path else None,
        "task_type": config.task_type,
        "target_modules": targets if isinstance(targets, str) or targets is None else sorted(targets),
        "r": config.r,
        "rank_pattern": config.rank_pattern,
        "gram_schmidt": config.apply_GS,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(row.parameters for row in rows),
        "saved": files.others,
        "rows": rows,
    }


def _show_adapter(summary: dict[str, Any]) -> None:
    from hra_fx.reporting.columns import table_of

    rows = summary["rows"]
    show_heading(
        f"HRA adapter in {summary['folder']}",
        {
            "base model": summary["base_model"] or "unknown",
            "task": summary["task_type"] or "",
            "vectors": f"{summary['dtype']}, r = {low_to_high([row.r for row in rows])}"
            + ", orthonormalized by Gram-Schmidt" * summary["gram_schmidt"],
            "trainable": f"{counted(summary['parameters'], 'parameter')} in {counted(len(rows), 'layer')}",
            "also in it": _some(summary["saved"]),
            "targets": _some(summary["target_modules"]),
        },
    )
    show_table(*table_of(rows, without=("weight change", "share of W", "d", "|Q - I|")))


def _some(names: list[str] | str | None) -> str:
    return names if isinstance(names, str) else some_of(names or [], 6)
