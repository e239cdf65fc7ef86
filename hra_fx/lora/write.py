"""Write adapters in the format of a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hra_fx.errors import AdapterError
from hra_fx.functional.low_rank import rounding_error
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.arguments import check_path
from hra_fx.lora.formats.diffusers import check_diffusers, write_diffusers
from hra_fx.lora.formats.gguf_file import check_gguf, write_gguf
from hra_fx.lora.formats.peft import write_peft
from hra_fx.lora.result import LoraResult, LoraRow
from hra_fx.lora.servers import check_for_server


@dataclass(frozen=True)
class Output:
    """Where and how adapters are written.

    Attributes:
        path: the folder or the file.
        kind: "peft", "gguf" or "diffusers".
        dtype: of the factors.
        rank_pattern: see `hra_fx.save_as_lora`.
        check: see `hra_fx.save_as_lora`.
    """

    path: Path
    kind: str
    dtype: torch.dtype
    rank_pattern: bool = False
    check: str | None = None


def check_lora(adapters: Mapping[str, LoraAdapter], output: Output) -> list[str]:
    """Check all but the values of the factors, so that a caller can do so before it computes them.

    Returns:
        What the server does not accept.

    Args:
        adapters: the adapter of each part of a pipeline; of a single model, under "".
        output: where and how.

    Raises:
        AdapterError, UnsupportedLayerError: the format does not support a model, a layer or `rank_pattern`.
        CheckpointError: the folder is not free for a LoRA, or a package is not installed.
        ConfigError: the server is not known.
    """
    check_path(output.path)
    if output.rank_pattern and output.kind != "peft":
        raise AdapterError(f"`rank_pattern` needs PEFT's format; the {output.kind} format has one rank. Omit it.")
    if output.kind == "gguf":
        check_gguf(adapters[""], output.path)
    elif output.kind == "diffusers":
        check_diffusers(adapters)
    if output.check is None:
        return []
    texts = [
        text
        for adapter in adapters.values()
        for text in check_for_server(
            output.check, adapter, adapter.rank, kind=output.kind, rank_pattern=output.rank_pattern
        )
    ]
    return list(dict.fromkeys(texts))


def write_lora(adapters: Mapping[str, LoraAdapter], output: Output) -> LoraResult:
    """Write adapters, and say what was written; arguments and errors as `check_lora`.

    Raises:
        AdapterError: also if a factor is out of the range of the dtype.
        CheckpointError: also if the files cannot be written.
    """
    path, dtype = output.path, output.dtype
    warnings = [*unchanged(adapters.values()), *check_lora(adapters, output)]
    if output.kind == "diffusers":
        write_diffusers(adapters, path, dtype)
    elif output.kind == "gguf":
        write_gguf(adapters[""], path, dtype)
    else:
        write_peft(adapters[""], path, dtype, rank_pattern=output.rank_pattern)
    rows = [
        LoraRow(f"{part}.{layer.path}".lstrip("."), layer.rank, layer.error, rounding_error(layer.A, layer.B, dtype))
        for part, adapter in adapters.items()
        for layer in adapter.layers
    ]
    rank = max(adapter.rank for adapter in adapters.values())
    return LoraResult(path, output.kind, rank, str(dtype).removeprefix("torch."), tuple(rows), tuple(warnings))


def unchanged(adapters: Iterable[LoraAdapter]) -> list[str]:
    """A warning if no adapter changes any weight."""
    if any(layer.rank for adapter in adapters for layer in adapter.layers):
        return []
    return ["the adapters do not change any weight (untrained, or at strength 0): the LoRA is zero."]
