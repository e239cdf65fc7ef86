"""An adapter as a GGUF file, which llama.cpp and programs made of it load beside their own file of the base model.

Source of the format: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` in https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.atomic_write import atomic_write
from hra_fx.checkpoint.weights import non_finite
from hra_fx.errors import AdapterError, CheckpointError
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.formats.gguf_names import INSTEAD, find_architecture, rows_in_order, tensor_name

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(adapter: LoraAdapter, path: Path, dtype: torch.dtype) -> None:
    """Write a LoRA adapter for llama.cpp.

    Args:
        adapter: the adapter.
        path: the file, replaced if it exists.
        dtype: `torch.float32`, `float16` or `bfloat16`.

    Raises:
        AdapterError: llama.cpp cannot load such an adapter, or a value is out of the range of `dtype`.
        UnsupportedLayerError: llama.cpp cannot adapt one of the layers.
        CheckpointError: the package gguf is not installed, or the file cannot be written.

        After any error, an old file is unchanged.
    """
    gguf = _package(path)
    writer = gguf.GGUFWriter(None, find_architecture(adapter).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp multiplies by alpha / rank of each tensor. With one rank for all layers, and alpha the same, this is
    # exactly 1. It also takes alpha 0 for 1 at any rank, but other programs that read the file may take it for 0.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    if adapter.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, adapter.base_model)
    for name, tensor in _tensors(adapter, dtype, gguf):
        # As bytes, since NumPy has no bfloat16.
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[_DTYPES[dtype]])
    try:
        atomic_write(path.resolve(), lambda file: _write(writer, Path(file.name)))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot write the file ({error}). The old file, if any, is unchanged. Choose another path."
        ) from error


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf, which is not installed. Run: pip install 'hra-fx[gguf]'."
        ) from error


def _tensors(adapter: LoraAdapter, dtype: torch.dtype, gguf: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file and their names, checked."""
    if adapter.copies:
        raise AdapterError(
            f"{next(iter(adapter.copies))}: a GGUF adapter changes weights of layers, and cannot replace biases and "
            f"modules_to_save. {INSTEAD}."
        )
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    numbers = (int(part) for layer in adapter.layers for part in layer.path.split(".") if part.isdigit())
    blocks = max(numbers, default=0) + 1
    names = gguf.get_tensor_name_map(architectures[find_architecture(adapter).name], blocks)
    for layer in adapter.layers:
        base = tensor_name(layer, adapter, names.get_name)
        A, B = layer.padded(adapter.rank)
        for suffix, factor in ("lora_a", A), ("lora_b", rows_in_order(layer, adapter, B)):
            tensor = factor.to(dtype)
            if non_finite(tensor):
                raise AdapterError(f"{layer.path}: its factors are out of the range of {dtype}. Use float32.")
            yield f"{base}.{suffix}", tensor


def _write(writer: Any, path: Path) -> None:
    """Write to a file that is also open elsewhere, where it is then flushed to disk."""
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
