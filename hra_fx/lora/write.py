"""Write adapters in the format of a runtime."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hra_fx.checkpoint.folder import write
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import AdapterError, CheckpointError
from hra_fx.functional.low_rank import rounding_error
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.diffusers_format import check_diffusers, write_diffusers
from hra_fx.lora.gguf_format import check_gguf, write_gguf
from hra_fx.lora.peft_format import peft_form
from hra_fx.lora.servers import check_for_server

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Files of transformers, timm and diffusers models, and of pipelines.
_OF_MODELS = ("config.json", "model_index.json")


@dataclass(frozen=True)
class LoraRow:
    """One layer of an export.

    Attributes:
        path: the qualified name of the layer; in a diffusers pipeline, with its part.
        rank: the rank of the weight change, before padding; 0 if the adapter does not change the layer.
        error: `|W Q - W - B A|_F / |W Q - W|_F` in float64; 0 unless a smaller rank was requested.
        rounding: the error of rounding the factors to `dtype`, also relative to the weight change.
    """

    path: str
    rank: int
    error: float
    rounding: float


@dataclass(frozen=True)
class LoraResult:
    """The result of `hra_fx.save_as_lora` or `hra-fx convert`.

    Attributes:
        path: the folder or the file.
        format: "peft", "gguf" or "diffusers".
        rank: the rank of all layers in the file.
        dtype: dtype of the factors, such as "float32".
        rows: one row for each layer.
        warnings: everything that the server in `check` does not accept.

    Example:
        >>> print(LoraResult(Path("out"), "peft", 8, "float32", (LoraRow("q_proj", 8, 0.0, 5e-8),)))
        out: 1 layer as LoRA of rank 8 (peft, float32)
          rounding error up to 5.0e-08 of the weight change (q_proj)
    """

    path: Path
    format: str
    rank: int
    dtype: str
    rows: tuple[LoraRow, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A summary in a few lines."""
        count = f"{len(self.rows)} layer{'s' * (len(self.rows) != 1)}"
        lines = [f"{self.path}: {count} as LoRA of rank {self.rank} ({self.format}, {self.dtype})"]
        rough = max(self.rows, key=lambda row: row.rounding)
        if rough.rounding:
            lines.append(f"  rounding error up to {rough.rounding:.1e} of the weight change ({rough.path})")
        cut = max(self.rows, key=lambda row: row.error)
        if cut.error:
            lines.append(f"  error of the smaller rank up to {cut.error:.1e} of the weight change ({cut.path})")
        return "\n".join([*lines, *(f"  warning: {text}" for text in self.warnings)])


@dataclass(frozen=True)
class Output:
    """The path and the format of the written adapters.

    Attributes:
        path: the folder or the file.
        file_format: "peft", "gguf" or "diffusers".
        dtype: dtype of the factors.
        rank_pattern: see `hra_fx.save_as_lora`.
        check: see `hra_fx.save_as_lora`.
    """

    path: Path
    file_format: str
    dtype: torch.dtype
    rank_pattern: bool = False
    check: str | None = None


def check_lora(adapters: Mapping[str, LoraAdapter], output: Output) -> list[str]:
    """Check everything except the values of the factors, so that a caller can check before it computes them.

    Returns:
        Sentences about everything that the server does not accept.

    Args:
        adapters: the adapter of each part of a pipeline; for a single model, under "".
        output: the path and the format.

    Raises:
        AdapterError, UnsupportedLayerError: the format does not support a model, a layer or `rank_pattern`.
        CheckpointError: the folder contains a model or an HRA adapter, or a package is not installed.
        ConfigError: the server is unknown.
    """
    check_path(output.path)
    if output.rank_pattern and output.file_format != "peft":
        raise AdapterError(f"`rank_pattern` needs PEFT's format; {output.file_format} has one rank. Omit it.")
    if output.file_format == "gguf":
        check_gguf(adapters[""], output.path)
    elif output.file_format == "diffusers":
        check_diffusers(adapters)
    if output.check is None:
        return []
    options: Any = {"file_format": output.file_format, "rank_pattern": output.rank_pattern}
    texts = (check_for_server(output.check, adapter, adapter.rank, **options) for adapter in adapters.values())
    return list(dict.fromkeys(chain.from_iterable(texts)))


def write_lora(adapters: Mapping[str, LoraAdapter], output: Output) -> LoraResult:
    """Write adapters, and return a summary. Arguments and errors are the same as for `check_lora`.

    Raises:
        AdapterError: a factor is out of the range of the dtype; see also `check_lora`.
        CheckpointError: the files cannot be written; see also `check_lora`.
    """
    path, dtype = output.path, output.dtype
    warnings = [*unchanged(adapters.values()), *check_lora(adapters, output)]
    if output.file_format == "diffusers":
        write_diffusers(adapters, path, dtype)
    elif output.file_format == "gguf":
        write_gguf(adapters[""], path, dtype)
    else:
        config, tensors = peft_form(adapters[""], dtype, rank_pattern=output.rank_pattern)
        write(path, json.dumps(config, indent=2, sort_keys=True), tensors, {})
    rows = [
        LoraRow(f"{part}.{layer.path}".lstrip("."), layer.rank, layer.error, rounding_error(layer.A, layer.B, dtype))
        for part, adapter in adapters.items()
        for layer in adapter.layers
    ]
    rank = max(adapter.rank for adapter in adapters.values())
    return LoraResult(path, output.file_format, rank, str(dtype).removeprefix("torch."), tuple(rows), tuple(warnings))


def unchanged(adapters: Iterable[LoraAdapter]) -> list[str]:
    """Return a warning if no adapter changes any weight."""
    if any(layer.rank for adapter in adapters for layer in adapter.layers):
        return []
    return ["the adapters do not change any weight (untrained, or at scale 0): the LoRA is zero."]


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the dtype of factors.

    Raises:
        AdapterError: LoRA adapters cannot be stored in this dtype.

    >>> check_dtype("bfloat16"), check_dtype(None)
    (torch.bfloat16, torch.float32)
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else torch.float32 if dtype is None else dtype
    if found not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise AdapterError(f"`dtype` must be one of {names}, got {dtype!r}.")
    return found


def check_path(path: Path) -> None:
    """Check that a LoRA can be written into a folder.

    Raises:
        CheckpointError: the folder contains a model, because `from_pretrained` would load it together with the LoRA; or
            an HRA adapter, which cannot be restored from its LoRA.
    """
    check_no_model(path)
    config = path / CONFIG_NAME
    if config.is_file() and re.search(r'"peft_type":\s*"HRA"', config.read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{path}: contains an HRA adapter, which the LoRA would overwrite and cannot restore. Choose another "
            "folder."
        )


def check_no_model(path: Path) -> None:
    """Check that a folder does not contain a model.

    Raises:
        CheckpointError: the folder contains a model.
    """
    model = next((name for name in _OF_MODELS if (path / name).exists()), None)
    if model:
        raise CheckpointError(
            f"{path}: contains a model ({model}), and from_pretrained would load the adapter with it. Choose another "
            "folder."
        )
