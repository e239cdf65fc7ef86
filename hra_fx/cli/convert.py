"""`hra-fx convert`: convert adapters to LoRA, or between the formats of PEFT's HRA and `hra_fx.save_adapter`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hra_fx.cli.options import Columns, Json, Overwrite, Quiet, Rows
from hra_fx.errors import CheckpointError

EXAMPLES = (
    "hra-fx convert my-adapter for-vllm --to lora --base my-model --check vllm",
    "hra-fx convert first second adapter.gguf --to gguf --base my-model --dtype float16",
    "hra-fx convert my-adapter for-peft --to peft",
    "hra-fx convert from-peft my-adapter --to hra_fx",
)
#: Files of adapters, of PEFT and diffusers.
_OF_ADAPTERS = ("adapter_config.json", "pytorch_lora_weights.safetensors")
_GGUF = ".gguf"


class Form(StrEnum):
    """The format of the result."""

    lora = "lora"
    gguf = "gguf"
    peft = "peft"
    hra_fx = "hra_fx"


class Dtype(StrEnum):
    """The dtype of LoRA factors."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def convert(
    context: typer.Context,
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Adapter folders or Hub names; for LoRA also several, in order."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; for gguf, a .gguf file.")],
    to: Annotated[Form, typer.Option("--to", help="Target format.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Folder of the base model; LoRA needs its weights.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Limit the LoRA rank (best approximation). Default: exact."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Dtype of the LoRA factors.")] = Dtype.float32,
    rank_pattern: Annotated[
        bool, typer.Option("--rank-pattern", help="Keep each layer's own rank; few servers support it. Only for lora.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="SERVER", help="Warn about what a server, such as vllm, does not accept."),
    ] = None,
    columns: Columns = None,
    rows: Rows = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert adapters to LoRA, for PEFT, vLLM, SGLang or llama.cpp; or one adapter to the format of PEFT or hra_fx.

    With --to lora and --to gguf, several adapters become one LoRA, which is exact unless --rank or --dtype limits it.
    Only the weights of adapted layers are read from MODEL. OUT is in PEFT's format, or in diffusers' format if MODEL is
    the UNet or transformer of a pipeline.

    With --to peft and --to hra_fx, outputs do not change. Without a rank_pattern, both libraries also load each other's
    folders directly. In PEFT's format, the frozen anchor becomes ordinary, trainable reflections, and all layers are
    padded to the largest rank of a rank_pattern. In hra_fx's format, copies of base weights are dropped.
    """
    if to in (Form.peft, Form.hra_fx):
        _refuse_options(context, to, len(adapters))
        _check_free(out, overwrite=overwrite)
        from hra_fx.cli.convert_hra import convert_hra

        convert_hra(adapters[0], out, for_peft=to is Form.peft, as_json=as_json)
        return
    if base is None:
        raise typer.BadParameter(f"--to {to.value} needs the folder of the base model", param_hint="--base")
    if (out.suffix.lower() == _GGUF) is not (to is Form.gguf):
        need = "a .gguf file" if to is Form.gguf else "a folder (.gguf files need --to gguf)"
        raise typer.BadParameter(f"--to {to.value} writes {need}, got {out}", param_hint="OUT")
    if rank_pattern and to is Form.gguf:
        raise typer.BadParameter(
            "a GGUF adapter has a single rank and alpha. Use --to lora", param_hint="--rank-pattern"
        )
    _check_free(out, overwrite=overwrite)
    from hra_fx.cli.screen import show_json, stdout
    from hra_fx.lora.disk.convert import convert_files

    result = convert_files(
        adapters,
        base,
        out,
        rank=rank,
        dtype=dtype.value,
        rank_pattern=rank_pattern,
        check=check,
        columns=[] if rows else columns or None,
        progress=not quiet,
    )
    show_json(result) if as_json else stdout().print(str(result), markup=False, soft_wrap=True)


def _refuse_options(context: typer.Context, to: Form, count: int) -> None:
    """LoRA's options have no meaning for the other formats."""
    if count > 1:
        raise typer.BadParameter(f"--to {to.value} converts one adapter, got {count}", param_hint="ADAPTER")
    for name in ("base", "rank", "dtype", "rank_pattern", "check", "columns", "rows"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("is an option of --to lora and --to gguf", param_hint=option)


def _check_free(out: Path, *, overwrite: bool) -> None:
    if out.suffix.lower() == _GGUF:
        if out.exists() and not overwrite:
            raise CheckpointError(f"{out}: the file exists. Choose another name, or --overwrite.")
        return
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if any(name in there for name in _OF_ADAPTERS) and not overwrite:
        raise CheckpointError(f"{out}: already contains an adapter. Choose another folder, or --overwrite.")
    from hra_fx.lora.arguments import check_no_model

    check_no_model(out)
    if there and not overwrite:
        raise CheckpointError(f"{out}: is not empty (it contains {there[0]}). Choose another folder, or --overwrite.")
