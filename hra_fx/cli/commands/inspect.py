"""`hra-fx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.options import Json
from hra_fx.cli.screen import count, show_heading, show_json, show_table
from hra_fx.errors import CheckpointError
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from hra_fx.cli.inspect_adapter import AdapterSummary
    from hra_fx.cli.inspect_model import ModelSummary

EXAMPLES = (
    "hra-fx inspect my-adapter",
    "hra-fx inspect my-model",
    "hra-fx inspect my-adapter --json | jq '.layers[].mean_angle'",
)
_ADAPTER = "adapter_config.json"


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Folder of an adapter (or its name on the Hub), or of a model.")
    ],
    as_json: Json = False,
) -> None:
    """Show the content of an adapter's or a model's folder.

    For an adapter: its layers, ranks, parameters and rotation angles. For a model: the layers that can be adapted.
    """
    folder = Path(path)
    of_model = folder.is_file() or (folder.is_dir() and not _holds_adapter(folder))
    if of_model:
        from hra_fx.cli.inspect_model import inspect_model

        model = inspect_model(folder)
        show_json(model) if as_json else _show_model(model)
    else:
        from hra_fx.cli.inspect_adapter import inspect_adapter

        adapter = inspect_adapter(path)
        show_json(adapter) if as_json else _show_adapter(adapter)


def _holds_adapter(folder: Path) -> bool:
    """Whether a folder or a subfolder has an adapter; raises an error if there is no model either."""
    if (folder / _ADAPTER).exists() or any(folder.glob(f"*/{_ADAPTER}")):
        return True
    if not (folder / "config.json").exists() and not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"{folder}: contains neither {_ADAPTER} nor config.json. Give the folder of an adapter or a model."
        )
    return False


def _show_adapter(summary: AdapterSummary) -> None:
    from hra_fx.reporting.columns import degrees

    targets = summary.target_modules
    show_heading(
        f"HRA adapter in {summary.folder}",
        {
            "base model": summary.base_model or "unknown",
            "task": summary.task_type or "",
            "written by": f"{summary.written_by}, {summary.dtype}",
            "vectors": f"r = {summary.r}{', orthonormalized by Gram-Schmidt' * summary.gram_schmidt}"
            + f", and {count(summary.anchor, 'frozen anchor vector')}" * bool(summary.anchor),
            "trainable": f"{count(summary.parameters, 'parameter')} in {count(len(summary.layers), 'layer')}",
            "also trained": _some(summary.saved),
            "targets": targets if isinstance(targets, str) else _some(targets or ()),
        },
    )
    columns = (
        Column("layer", is_text=True),
        Column("d", priority=1),
        Column("r", priority=3),
        Column("params", priority=2),
        Column("|Q - I|", priority=4),
        Column("mean angle"),
        Column("largest"),
    )
    rows = [
        (
            layer.path,
            str(layer.d),
            str(layer.r),
            f"{layer.parameters:,}",
            f"{layer.rotation:.3f}",
            degrees(layer.mean_angle),
            degrees(layer.angle),
        )
        for layer in summary.layers
    ]
    show_table(columns, rows)


def _show_model(summary: ModelSummary) -> None:
    from hra_fx.checkpoint.disk.report import file_size
    from hra_fx.cli.layers import grouped

    targets = summary.default_targets
    dtypes = dict.fromkeys(dtype for file in summary.files for dtype in file.dtypes)
    total = file_size(sum(file.bytes for file in summary.files))
    weights = f"{count(len(summary.files), 'file')}, {total}, {', '.join(dtypes)}"
    show_heading(
        f"{summary.model} ({summary.library}) in {summary.folder}",
        {
            "parameters": f"{summary.parameters:,}",
            "weights": weights if summary.files else "no safetensors files",
            "default targets": targets if isinstance(targets, str) else ", ".join(targets or ()) or "none, name some",
            "adaptable": count(len(summary.layers), "layer"),
        },
    )
    columns = (
        Column("layer", is_text=True),
        Column("count"),
        Column("type", is_text=True, priority=2),
        Column("d"),
        Column("params", priority=1),
    )
    rows = [
        (group.path, str(group.count), group.site, str(group.d), f"{group.parameters:,}")
        for group in grouped(summary.layers)
    ]
    show_table(columns, rows)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
