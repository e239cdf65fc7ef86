"""Write adapters in the format of a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.formats.diffusers import write_diffusers
from hra_fx.lora.formats.gguf_file import write_gguf
from hra_fx.lora.formats.peft import write_peft
from hra_fx.lora.result import LoraResult, result_of
from hra_fx.lora.servers import check_for_server


def write_lora(
    adapters: Mapping[str, LoraAdapter],
    path: Path,
    kind: str,
    dtype: torch.dtype,
    *,
    rank_pattern: bool = False,
    check: str | None = None,
) -> LoraResult:
    """Write adapters, and say what was written.

    Args:
        adapters: the adapter of each part of a pipeline; of a single model, under "".
        path: the folder or the file.
        kind: "peft", "gguf" or "diffusers".
        dtype: of the factors.
        rank_pattern: see `hra_fx.save_as_lora`.
        check: see `hra_fx.save_as_lora`.

    Raises:
        CheckpointError: the files cannot be written.
        ConfigError: the server is not known.
    """
    warnings = [
        text
        for adapter in adapters.values()
        for text in (check_for_server(check, adapter, adapter.rank, rank_pattern=rank_pattern) if check else ())
    ]
    if kind == "diffusers":
        write_diffusers(adapters, path, dtype)
    elif kind == "gguf":
        write_gguf(adapters[""], path, dtype)
    else:
        write_peft(adapters[""], path, dtype, rank_pattern=rank_pattern)
    return result_of(path, kind, dict(adapters), dtype, warnings)
