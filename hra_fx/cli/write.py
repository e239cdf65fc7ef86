"""The commands that write files: `hra-fx fold` and `hra-fx convert`."""

from __future__ import annotations

import importlib
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hra_fx.cli.screen import Json, show_json
from hra_fx.errors import CheckpointError


def fold(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder of the model.")],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Folders of adapters, in the order of folding."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder.")],
    as_json: Json = False,
) -> None:
    """Fold adapters into the model of a folder. OUT is the base model with rotated weights.

    The model is loaded into memory with its own class. All other files are copied. OUT is complete, or unchanged after
    an error.
    """
    from hra_fx.api.fold_checkpoint import fold_checkpoint

    _hide_progress_bars()
    _show(fold_checkpoint(base, adapters, out), as_json)


#: The formats of a result.
Form = StrEnum("Form", ["lora", "gguf"])
#: The dtypes of the factors.
Dtype = StrEnum("Dtype", ["float32", "float16", "bfloat16"])


def convert(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER", help="Adapter folders or Hub names, in order.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; for gguf, a .gguf file.")],
    to: Annotated[Form, typer.Option("--to", help="Target format.")],
    base: Annotated[Path, typer.Option("--base", metavar="MODEL", help="Folder of the base model, which is loaded.")],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Limit the LoRA rank (best approximation). Default: exact."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Dtype of the LoRA factors.")] = Dtype.float32,
    as_json: Json = False,
) -> None:
    """Convert adapters to one LoRA, for PEFT, vLLM, SGLang or llama.cpp.

    The LoRA is exact unless --rank or --dtype limits it. OUT is in PEFT's format, or in diffusers' format if MODEL is
    the UNet or transformer of a pipeline.
    """
    if (out.suffix.lower() == ".gguf") is not (to is Form.gguf):
        need = "a .gguf file" if to is Form.gguf else "a folder (.gguf files need --to gguf)"
        raise typer.BadParameter(f"--to {to} writes {need}, got {out}", param_hint="OUT")
    # Also if the user forgot OUT, so that the last adapter was parsed as OUT.
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already exists. The last path is the output: name a new one, or delete it.")
    from hra_fx.api.fold_checkpoint import load_adapted
    from hra_fx.lora.save import save_as_lora

    _hide_progress_bars()
    model, names = load_adapted(base, adapters)
    _show(save_as_lora(model, out, names, rank=rank, dtype=dtype.value), as_json)


def _show(result: Any, as_json: bool) -> None:
    """Print a result of the library: its own summary, or its fields as JSON."""
    show_json(result) if as_json else typer.echo(str(result))


def _hide_progress_bars() -> None:
    """Hide the progress bars of transformers if stderr is not a terminal."""
    if not sys.stderr.isatty():
        settings: Any = importlib.import_module("transformers.utils.logging")
        settings.disable_progress_bar()
