"""The commands that write files: `hra-fx fold` and `hra-fx convert`."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from hra_fx.cli.screen import Json, count, show_heading, show_json, show_result, span
from hra_fx.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from hra_fx.checkpoint.adapter import Adapter

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

_OF_LORA = ("base", "rank", "dtype", "rank_pattern", "check", "columns", "rows")


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
Form = StrEnum("Form", ["lora", "gguf", "peft", "hra_fx"])


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
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="Dtype of the LoRA factors: float32, float16 or bfloat16.")
    ] = "float32",
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
        _convert_hra(adapters[0], out, for_peft=to is Form.peft, as_json=as_json)
        return
    if base is None:
        raise typer.BadParameter(f"--to {to} needs the folder of the base model", param_hint="--base")
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
        rank_pattern=rank_pattern,
        check=check,
        columns=[] if rows else columns or None,
        progress=not quiet,
    )
    show_result(result, as_json=as_json)


def _refuse_options(context: typer.Context, to: Form, number: int) -> None:
    """Raise an error if options of LoRA are used for another format."""
    if number > 1:
        raise typer.BadParameter(f"--to {to} converts one adapter, got {number}", param_hint="ADAPTER")
    for name in _OF_LORA:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter("is an option of --to lora and --to gguf", param_hint=option)


def _check_free(out: Path, *, overwrite: bool) -> None:
    from hra_fx.lora.save import check_no_model

    check_no_model(out)
    if not overwrite and out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already exists. Choose another name, or pass --overwrite.")


def _convert_hra(source: str, out: Path, *, for_peft: bool, as_json: bool) -> None:
    """Write an adapter in the format of PEFT or hra_fx, and print what was written.

    Both formats have the same two files. hra_fx's files may also contain the vectors before Gram-Schmidt, and metadata:
    how a chain is split into an anchor and trained vectors, and a row of the base model. PEFT ignores these. PEFT's
    files may contain copies of base weights. PEFT has one rank for all layers: smaller ranks are padded with pairs of
    equal reflections, which cancel.
    """
    from hra_fx.checkpoint.adapter import RESUME, read_adapter
    from hra_fx.checkpoint.base_model import BASE_ROW
    from hra_fx.checkpoint.folder import write

    files = read_adapter(source)
    if for_peft and files.config.target_parameters:
        raise CheckpointError(
            f"{files.file}: the adapter adapts parameters of experts (target_parameters="
            f"{files.config.target_parameters}), which PEFT's HRA does not support. Use --to lora."
        )
    if for_peft and files.config.trainable_token_indices:
        raise CheckpointError(
            f"{files.file}: the adapter trains tokens (trainable_token_indices), which PEFT's HRA does not support. "
            "Load it with hra_fx.load_adapter, and save it with hra_fx.save_as_lora, for PEFT's LoRA."
        )
    kept = _kept(files, for_peft=for_peft)
    config = dataclasses.replace(files.config, extra={}, peft_version=None)
    if for_peft and config.rank_pattern:
        rank = max(chain.shape[-1] for chain in files.chains.values())
        config = dataclasses.replace(config, r=rank, rank_pattern={}, apply_GS=False)
        kept |= _of_one_rank(files, rank)
    metadata = {} if for_peft else {key: files.metadata[key] for key in (RESUME, BASE_ROW) if key in files.metadata}
    write(out, config.to_json_string(), kept, metadata)
    dropped = [key for key in files.tensors if key not in kept]
    fields = [*sorted(files.config.extra), *(["peft_version"] if files.config.peft_version else [])]
    layers, frozen = len(files.chains), max(map(files.resume.anchor, files.chains)) if for_peft else 0
    if as_json:
        done = {"folder": out, "form": "peft" if for_peft else "hra_fx", "layers": layers, "r": config.r}
        show_json({**done, "anchor": frozen, "dropped": dropped, "fields": fields})
        return
    left_out = [count(len(dropped), "tensor")] if dropped else []
    left_out += [f"configuration fields {', '.join(fields)}"] if fields else []
    ranks = span([*map(config.rank_of, files.chains)])
    anchor = f", {frozen} of them previously frozen" if frozen else ""
    show_heading(
        f"HRA adapter in {out}, in the format of {'PEFT' if for_peft else 'hra_fx'}",
        {
            "reflections": f"{ranks} in each of {count(layers, 'layer')}{anchor}",
            "dropped": ", ".join(left_out) or "nothing",
        },
    )


def _of_one_rank(files: Adapter, rank: int) -> dict[str, Tensor]:
    """Pad the chains of all layers to the same rank."""
    from hra_fx.checkpoint.folder import reflection_key
    from hra_fx.functional.chain import padded
    from hra_fx.model.example_inputs import preserve_rng_state, seed_everything

    chains = {}
    with preserve_rng_state():
        seed_everything(0)  # so that the files are always the same
        for path, chain in files.chains.items():
            key = reflection_key(path)
            try:
                chains[key] = padded(chain.double(), rank).to(files.tensors[key].dtype)
            except ValueError as error:
                raise CheckpointError(
                    f"{files.file}: {path}: {error}. PEFT has one rank for all layers, so it cannot represent this "
                    "adapter. Use --to lora, or train with ranks that are all even or all odd."
                ) from error
    return chains


def _kept(files: Adapter, *, for_peft: bool) -> dict[str, Tensor]:
    """The tensors that the new format contains."""
    from hra_fx.checkpoint.folder import PREFIX, VECTORS
    from hra_fx.layers.target import REFLECTION

    kept = {}
    for key, tensor in files.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        last = name.rpartition(".")[2]
        ours = last == REFLECTION or name in files.full or (last == VECTORS and files.resume.has_anchors)
        if (last != VECTORS) if for_peft else ours:
            kept[key] = tensor
    return kept
