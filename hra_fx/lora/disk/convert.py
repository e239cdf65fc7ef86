"""Convert adapters on disk to LoRA on disk, without a model in memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.arguments import Source, base_folder
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.arguments import check_dtype
from hra_fx.lora.disk.read import read_as_lora
from hra_fx.lora.formats.diffusers_parts import part_of_class
from hra_fx.lora.result import LoraResult
from hra_fx.lora.write import Output, check_lora, write_lora


def convert_files(
    adapters: Sequence[Source],
    base: Source,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    rank_pattern: bool = False,
    check: str | None = None,
    columns: Collection[str] | None = None,
    progress: bool = True,
) -> LoraResult:
    """Write adapters, applied in order, as one LoRA.

    Args:
        adapters: as in `read_as_lora`.
        base: as in `read_as_lora`.
        out: a folder, in the format of diffusers if the base is a UNet or transformer of diffusers, else of PEFT; or a
            file that ends in ".gguf".
        rank: as in `hra_fx.save_as_lora`.
        dtype: as in `hra_fx.save_as_lora`.
        rank_pattern: as in `hra_fx.save_as_lora`.
        check: as in `hra_fx.save_as_lora`.
        columns: as in `read_as_lora`.
        progress: as in `read_as_lora`.

    Raises:
        AdapterError, CheckpointError, FoldError, UnsupportedLayerError: see `read_as_lora` and `hra_fx.save_as_lora`.
    """
    chosen, path = check_dtype(dtype), Path(out)
    to_gguf = path.suffix.lower() == ".gguf"
    part = None if to_gguf else part_of_class(Architecture(base_folder(base)).entries.get("_class_name"))
    kind = "gguf" if to_gguf else "diffusers" if part else "peft"
    output = Output(path, kind, chosen, rank_pattern, check)

    def check_first(adapter: LoraAdapter) -> None:
        check_lora({part or "": adapter}, output)

    adapter = read_as_lora(adapters, base, rank=rank, columns=columns, progress=progress, check=check_first)
    return write_lora({part or "": adapter}, output)
