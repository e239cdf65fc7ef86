"""`hra-fx inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.options import Json
from hra_fx.cli.screen import Column, count, show_heading, show_json, show_table, size
from hra_fx.errors import CheckpointError

if TYPE_CHECKING:
    from hra_fx.cli.inspect_adapter import AdapterLook
    from hra_fx.cli.inspect_model import ModelLook

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
    """Show what is in the folder of an adapter or of a model.

    Of an adapter: its layers, ranks, parameters, and how far each layer is turned, from the vectors alone. Of a model:
    the layers that could be adapted, from its config.json alone.
    """
    folder = Path(path)
    of_model = folder.is_file() or (folder.is_dir() and not _holds_adapter(folder))
    if of_model:
        from hra_fx.cli.inspect_model import look_at_model

        model = look_at_model(folder)
        show_json(model) if as_json else _show_model(model)
    else:
        from hra_fx.cli.inspect_adapter import look_at_adapter

        adapter = look_at_adapter(path)
        show_json(adapter) if as_json else _show_adapter(adapter)


def _holds_adapter(folder: Path) -> bool:
    """Whether it is, or holds, that of an adapter; a folder that is neither is said to be none of both."""
    if (folder / _ADAPTER).exists() or any(folder.glob(f"*/{_ADAPTER}")):
        return True
    if not (folder / "config.json").exists() and not (folder / "model_index.json").exists():
        raise CheckpointError(
            f"{folder}: there is neither {_ADAPTER} nor config.json in it. Give the folder that an adapter or a model "
            "was saved in."
        )
    return False


def _show_adapter(look: AdapterLook) -> None:
    from hra_fx.reporting.columns import degrees

    targets = look.target_modules
    show_heading(
        f"HRA adapter in {look.folder}",
        {
            "base model": look.base_model or "not named",
            "task": look.task_type or "",
            "written by": f"{look.written_by}, {look.dtype}",
            "vectors": f"r = {look.r}{', made orthonormal by Gram-Schmidt' * look.gram_schmidt}"
            + f", behind {count(look.anchor, 'frozen one')}" * bool(look.anchor),
            "trained": f"{count(look.parameters, 'parameter')} at {count(len(look.layers), 'layer')}",
            "trained too": _some(look.saved),
            "targets": targets if isinstance(targets, str) else _some(targets or ()),
        },
    )
    columns = (
        Column("layer", words=True),
        Column("d", rank=1),
        Column("r", rank=3),
        Column("params", rank=2),
        Column("|Q - I|", rank=4),
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
        for layer in look.layers
    ]
    show_table(columns, rows)


def _show_model(look: ModelLook) -> None:
    from hra_fx.cli.grouping import grouped

    targets = look.default_targets
    dtypes = dict.fromkeys(dtype for file in look.files for dtype in file.dtypes)
    weights = f"{count(len(look.files), 'file')}, {size(sum(file.bytes for file in look.files))}, {', '.join(dtypes)}"
    show_heading(
        f"{look.model} of {look.library}, in {look.folder}",
        {
            "parameters": f"{look.parameters:,}",
            "weights": weights if look.files else "no safetensors file",
            "default targets": targets if isinstance(targets, str) else ", ".join(targets or ()) or "none: name some",
            "could be adapted": count(len(look.layers), "layer"),
        },
    )
    columns = (
        Column("layer", words=True),
        Column("count"),
        Column("site", words=True, rank=2),
        Column("d"),
        Column("params", rank=1),
    )
    rows = [
        (group.path, str(group.count), group.site, str(group.d), f"{group.parameters:,}")
        for group in grouped(look.layers)
    ]
    show_table(columns, rows)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)
