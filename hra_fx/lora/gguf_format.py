"""Write an adapter as a GGUF file, which llama.cpp and programs based on it load together with the base model's file.

Sources, in https://github.com/ggml-org/llama.cpp: `convert_lora_to_gguf.py` for the format; the scripts in
`conversion/`, which write model files, for architectures, tensor names and the order of rows; and
`src/llama-adapter.cpp`, which reads adapters. llama.cpp does not load an adapter for another architecture, or with a
tensor that the model file does not have. These adapters raise an error here, before anything is written.
"""

from __future__ import annotations

import importlib
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
    **{name: name for name in ("gemma3", "granite", "llama", "phi3", "qwen2", "qwen3", "smollm3")},
    **{"gemma3_text": "gemma3", "mistral": "llama"},
}
#: Architectures with a rotary embedding that rotates rows `2i` and `2i + 1` of a head, while transformers rotates rows
#: `i` and `i + head_dim / 2`. In their model files, the rows of queries and keys are reordered.
_ROTATING_PAIRS = ("granite", "llama", "smollm3")
#: What to do for other models and layers.
_INSTEAD = "Save the LoRA in a folder, and run `python convert_lora_to_gguf.py --base BASE FOLDER` of llama.cpp."
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_gguf(adapter: LoraAdapter, path: Path, dtype: torch.dtype) -> None:
    """Write a LoRA adapter for llama.cpp. The folder is created if needed; on error, an old file is unchanged."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"{path}: GGUF files need the package gguf, which is not installed. Run: pip install gguf."
        ) from error
    model_type = adapter.model_config.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise AdapterError(f"GGUF adapters are written for the model types {known}, got {model_type!r}. {_INSTEAD}")
    if adapter.copies:
        name = next(iter(adapter.copies))
        raise AdapterError(f"{name}: a GGUF adapter cannot have biases or modules_to_save. Fold it (hra_fx.fold).")
    names = _tensor_names(adapter, ARCHITECTURES[model_type], gguf)
    writer = gguf.GGUFWriter(None, ARCHITECTURES[model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp multiplies by alpha / rank of each tensor. If all layers have the same rank and alpha equals it, this is
    # exactly 1. llama.cpp also interprets alpha 0 as 1 for any rank, but other programs may interpret it as 0.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    for layer in adapter.layers:
        A, B = layer.padded(adapter.rank)
        for suffix, factor in {"lora_a": A, "lora_b": _rows_in_order(layer, adapter, B)}.items():
            tensor = factor.to(dtype).contiguous()
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"{layer.path}: its factors are out of the range of {dtype}. Use float32.")
            # As bytes, because NumPy does not support bfloat16.
            data, kind = tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType[_DTYPES[dtype]]
            writer.add_tensor(f"{names[layer.path]}.{suffix}", data, raw_dtype=kind)
    write_files(path.parent, {path.name: lambda file: _write(writer, file)})


def _tensor_names(adapter: LoraAdapter, architecture: str, gguf: Any) -> dict[str, str]:
    """Path of a layer -> name of its weight in llama.cpp, such as "blk.0.attn_q.weight"."""
    numbers = (int(part) for layer in adapter.layers for part in layer.path.split(".") if part.isdigit())
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], 1 + max(numbers, default=0))
    found = {}
    for layer in adapter.layers:
        # Without a head, layers do not have the prefix "model."; a multimodal model has several parts.
        path = layer.path.replace("language_model.", "")
        name = None if layer.kind != "linear" else names.get_name(path) or names.get_name(f"model.{path}")
        if name is None:
            raise UnsupportedLayerError(
                f"{layer.path}: llama.cpp has no weight for this {layer.kind} layer in {architecture!r}, so a GGUF "
                "adapter cannot change it. Leave the layer out with exclude_modules, or fold it (hra_fx.fold)."
            )
        found[layer.path] = f"{name}.weight"
    return found


def _write(writer: Any, path: Path) -> None:
    with closing(writer):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _rows_in_order(layer: LoraLayer, adapter: LoraAdapter, B: Tensor) -> Tensor:
    """Sort the rows of `B: (out, rank)` in the order of llama.cpp's model files."""
    config = adapter.model_config
    if ARCHITECTURES[config["model_type"]] not in _ROTATING_PAIRS or not layer.path.endswith((".q_proj", ".k_proj")):
        return B
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return B.view(-1, 2, size // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
