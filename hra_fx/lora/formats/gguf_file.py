"""Write an adapter as a GGUF file, which llama.cpp and programs based on it load along with the base model's file.

Source of the format: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` in https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import importlib
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.atomic_write import atomic_write
from hra_fx.checkpoint.folder import non_finite
from hra_fx.errors import AdapterError, CheckpointError
from hra_fx.lora.adapter import LoraAdapter, LoraLayer
from hra_fx.lora.formats.gguf_names import INSTEAD, find_architecture, rows_in_order, tensor_name

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_gguf(adapter: LoraAdapter, path: Path) -> None:
    """Check all but the values of the factors, so that a caller can do so before it computes them.

    Raises:
        AdapterError: llama.cpp cannot load such an adapter.
        UnsupportedLayerError: llama.cpp cannot adapt one of the layers.
        CheckpointError: the package gguf is not installed, or there is a folder in the place of the file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder. Give the name of a file.")
    _tensor_names(adapter, _package(path))


def write_gguf(adapter: LoraAdapter, path: Path, dtype: torch.dtype) -> None:
    """Write a LoRA adapter for llama.cpp. After any error, an old file is unchanged.

    Args:
        adapter: the adapter.
        path: the file, replaced if it exists. Its folder is created if needed.
        dtype: `torch.float32`, `float16` or `bfloat16`.

    Raises:
        AdapterError: a value is out of the range of `dtype`; otherwise see `check_gguf`.
        CheckpointError: also if the file cannot be written.
    """
    gguf = _package(path)
    names = _tensor_names(adapter, gguf)
    writer = gguf.GGUFWriter(None, find_architecture(adapter).name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp multiplies by alpha / rank of each tensor. With one rank for all layers, and alpha the same, this is
    # exactly 1. It also takes alpha 0 for 1 at any rank, but other programs that read the file may take it for 0.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    if adapter.base_model:
        writer.add_base_model_count(1)
        # The file is for others, who need no path of this machine.
        is_path = os.path.isabs(adapter.base_model) or os.path.isdir(adapter.base_model)
        writer.add_base_model_name(0, Path(adapter.base_model).name if is_path else adapter.base_model)
    for layer in adapter.layers:
        for suffix, tensor in _factors(layer, adapter, dtype).items():
            # As bytes, since NumPy has no bfloat16.
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(
                f"{names[layer.path]}.{suffix}", data, raw_dtype=gguf.GGMLQuantizationType[_DTYPES[dtype]]
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path.resolve(), lambda file: _write(writer, file))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot write the file ({error.strerror}). The old file, if any, is unchanged. Choose another "
            "path."
        ) from error


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf, which is not installed. Run: pip install gguf."
        ) from error


def _tensor_names(adapter: LoraAdapter, gguf: Any) -> dict[str, str]:
    """Path of a layer -> name of its weight in llama.cpp."""
    if adapter.copies:
        raise AdapterError(
            f"{next(iter(adapter.copies))}: a GGUF adapter can only change weights of layers, not biases or "
            f"modules_to_save. {INSTEAD}."
        )
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = 1 + max(
        (int(part) for layer in adapter.layers for part in layer.path.split(".") if part.isdigit()), default=0
    )
    names = gguf.get_tensor_name_map(architectures[find_architecture(adapter).name], blocks)
    return {layer.path: tensor_name(layer, adapter, names.get_name) for layer in adapter.layers}


def _factors(layer: LoraLayer, adapter: LoraAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two tensors of a layer, by the ends of their names."""
    A, B = layer.padded(adapter.rank)
    factors = {"lora_a": A.to(dtype), "lora_b": rows_in_order(layer, adapter, B).to(dtype)}
    if any(non_finite(factor) for factor in factors.values()):
        raise AdapterError(f"{layer.path}: its factors are out of the range of {dtype}. Use float32.")
    return factors


def _write(writer: Any, path: Path) -> None:
    """Write to a file that is also open elsewhere, where it is then flushed to disk."""
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
