"""Write an adapter as a GGUF file, which llama.cpp and programs based on it load together with the base model's file.

Sources, in https://github.com/ggml-org/llama.cpp: `convert_lora_to_gguf.py` for the format; the scripts in
`conversion/`, which write model files, for architectures, tensor names and the order of rows; and
`src/llama-adapter.cpp`, which reads adapters. llama.cpp does not load an adapter for another architecture, or with a
tensor that the model file does not have. These adapters raise an error here, before anything is written.
"""

from __future__ import annotations

import importlib
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import write_files
from hra_fx.errors import AdapterError, CheckpointError, UnsupportedLayerError
from hra_fx.lora.adapter import LoraAdapter, LoraLayer

#: transformers' model type -> llama.cpp's architecture.
ARCHITECTURES = {
    **{name: name for name in ("gemma", "gemma2", "gemma3", "gpt2", "granite", "llama", "olmo2", "phi3")},
    **{name: name for name in ("qwen2", "qwen3", "smollm3", "starcoder2")},
    **{"gemma3_text": "gemma3", "mistral": "llama", "phi": "phi2"},
}
#: Architectures with a rotary embedding that rotates rows `2i` and `2i + 1` of a head, while transformers rotates rows
#: `i` and `i + head_dim / 2`. In their model files, the rows of queries and keys are reordered.
_ROTATING_PAIRS = ("granite", "llama", "smollm3")
#: What to do with an adapter that llama.cpp cannot load.
_INSTEAD = "Fold the model instead (hra_fx.fold), and convert the folded model with llama.cpp"
_LEAVE_OUT = f"{_INSTEAD}; or leave the layer out with exclude_modules."
_QUERIES_AND_KEYS = (".q_proj", ".k_proj")
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(adapter: LoraAdapter, path: Path, dtype: torch.dtype) -> None:
    """Write a LoRA adapter for llama.cpp. The folder is created if needed; on error, an old file is unchanged."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf, which is not installed. Run: pip install gguf."
        ) from error
    names = _tensor_names(adapter, gguf)
    writer = gguf.GGUFWriter(None, _architecture_of(adapter))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp multiplies by alpha / rank of each tensor. If all layers have the same rank and alpha equals it, this is
    # exactly 1. llama.cpp also interprets alpha 0 as 1 for any rank, but other programs may interpret it as 0.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    if adapter.base_model:
        writer.add_base_model_count(1)
        # The file is for other users, so it must not contain a path of this machine.
        is_path = os.path.isabs(adapter.base_model) or os.path.isdir(adapter.base_model)
        writer.add_base_model_name(0, Path(adapter.base_model).name if is_path else adapter.base_model)
    for layer in adapter.layers:
        for suffix, tensor in _factors(layer, adapter, dtype).items():
            # As bytes, because NumPy does not support bfloat16.
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(
                f"{names[layer.path]}.{suffix}", data, raw_dtype=gguf.GGMLQuantizationType[_DTYPES[dtype]]
            )
    target = path.resolve()  # a symbolic link is kept
    write_files(target.parent, {target.name: lambda file: _write(writer, file)})


def _tensor_names(adapter: LoraAdapter, gguf: Any) -> dict[str, str]:
    """Path of a layer -> name of its weight in llama.cpp, such as "blk.0.attn_q.weight"."""
    if adapter.copies:
        raise AdapterError(
            f"{next(iter(adapter.copies))}: a GGUF adapter can only change weights of layers, not biases "
            f"or modules_to_save. {_INSTEAD}."
        )
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = 1 + max(
        (int(part) for layer in adapter.layers for part in layer.path.split(".") if part.isdigit()), default=0
    )
    names = gguf.get_tensor_name_map(architectures[_architecture_of(adapter)], blocks)
    found = {}
    for layer in adapter.layers:
        # In a language model without a head, layers do not have the prefix "model."; a multimodal model has several
        # parts.
        path = layer.path.replace("language_model.", "")
        name = None if layer.kind != "linear" else names.get_name(path) or names.get_name(f"model.{path}")
        if name is None:
            raise UnsupportedLayerError(
                f"{layer.path}: llama.cpp has no weight for this {layer.kind} layer of a model of type "
                f"{adapter.model_config['model_type']!r}, so a GGUF adapter cannot change it. {_LEAVE_OUT}"
            )
        found[layer.path] = f"{name}.weight"
    return found


def _factors(layer: LoraLayer, adapter: LoraAdapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two tensors of a layer, by the suffixes of their names."""
    A, B = layer.padded(adapter.rank)
    factors = {"lora_a": A.to(dtype), "lora_b": _rows_in_order(layer, adapter, B).to(dtype)}
    if not all(bool(factor.isfinite().all()) for factor in factors.values()):
        raise AdapterError(f"{layer.path}: its factors are out of the range of {dtype}. Use float32.")
    return factors


def _write(writer: Any, path: Path) -> None:
    """Write to a file that the caller has also opened and flushes to disk."""
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _architecture_of(adapter: LoraAdapter) -> str:
    """llama.cpp's architecture of the base model."""
    model_type = adapter.model_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise AdapterError(
            f"GGUF adapters can be written for the model types {', '.join(sorted(ARCHITECTURES))}, got {model_type!r}. "
            f"{_INSTEAD}."
        )
    return ARCHITECTURES[model_type]


def _rows_in_order(layer: LoraLayer, adapter: LoraAdapter, B: Tensor) -> Tensor:
    """Sort the rows of `B: (out, rank)` in the order of llama.cpp's model files."""
    if _architecture_of(adapter) not in _ROTATING_PAIRS or not layer.path.endswith(_QUERIES_AND_KEYS):
        return B
    # The configuration of a multimodal model contains that of its language model.
    config = {**adapter.model_config, **(adapter.model_config.get("text_config") or {})}
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return B.view(-1, 2, size // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
