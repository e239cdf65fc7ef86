"""The commands that write files: `hra-fx fold` and `hra-fx convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from hra_fx.cli.screen import Json, show_result
from hra_fx.errors import CheckpointError

Columns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME",
        help="A layer that stores its weight as (in, out), by the end of its path. Repeatable. Not needed for models "
        "with a config.json.",
    ),
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists, after everything is written.")
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bar.")]
Rows: TypeAlias = Annotated[
    bool, typer.Option("--rows", help="Every weight is (out, in). Not needed for models with a config.json.")
]


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the model.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders of adapters, in the order of folding."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder.")],
    part: Annotated[
        str | None, typer.Option("--part", metavar="FOLDER", help="The part of a pipeline to change, such as unet.")
    ] = None,
    columns: Columns = None,
    rows: Rows = False,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Re-read the result; check that row norms and all other values are preserved."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into a checkpoint on disk. OUT is the base model with rotated weights.

    Weights are read file by file, and all other files are copied unchanged. OUT is complete, or unchanged after an
    error.
    """
    from hra_fx.checkpoint.disk.fold import fold_checkpoint

    report = fold_checkpoint(
        base,
        {part: adapters} if part else adapters,
        out,
        columns=[] if rows else columns or None,
        overwrite=overwrite,
        verify=verify,
        progress=not quiet,
    )
    show_result(report, as_json=as_json)


#: The formats of a result.
Form = StrEnum("Form", ["lora", "gguf"])


def convert(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapter folders or Hub names, in order.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; for gguf, a .gguf file.")],
    to: Annotated[Form, typer.Option("--to", help="Target format.")],
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="Folder of the base model; LoRA needs its weights.")
    ],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Limit the LoRA rank (best approximation). Default: exact."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="Dtype of the LoRA factors: float32, float16 or bfloat16.")
    ] = "float32",
    columns: Columns = None,
    rows: Rows = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert adapters to one LoRA, for PEFT, vLLM, SGLang or llama.cpp.

    The LoRA is exact unless --rank or --dtype limits it. Only the weights of adapted layers are read from MODEL. OUT is
    in PEFT's format, or in diffusers' format if MODEL is the UNet or transformer of a pipeline.
    """
    if (out.suffix.lower() == ".gguf") is not (to is Form.gguf):
        need = "a .gguf file" if to is Form.gguf else "a folder (.gguf files need --to gguf)"
        raise typer.BadParameter(f"--to {to} writes {need}, got {out}", param_hint="OUT")
    _check_free(out, overwrite=overwrite)
    from hra_fx.lora.save import convert_files

    result = convert_files(
        adapters,
        base,
        out,
        rank=rank,
        dtype=dtype,
        columns=[] if rows else columns or None,
        progress=not quiet,
    )
    show_result(result, as_json=as_json)


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Check that nothing is lost, also if the user forgot OUT, so that the last adapter was parsed as OUT."""
    from hra_fx.lora.save import check_no_model

    check_no_model(out)
    if not overwrite and out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(
            f"{out}: already exists. The last path is the output: name a new one. To replace it, pass --overwrite."
        )
