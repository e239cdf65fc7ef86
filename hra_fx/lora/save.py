"""Convert the adapters of a model to LoRA: `convert_to_lora`, `save_as_lora`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.checkpoint.folder import output_folder, write
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import AdapterError, CheckpointError, HRAWarning
from hra_fx.layers.sharding import on_first_rank
from hra_fx.lora.adapter import LoraAdapter, peft_form
from hra_fx.lora.diffusers_format import adapters_of, parts_of, write_diffusers
from hra_fx.lora.from_model import lora_adapter
from hra_fx.lora.gguf_format import write_gguf

#: Suffixes of files, not of folders, in which others save a LoRA.
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraResult:
    """The result of `hra_fx.save_as_lora` or `hra-fx convert`.

    Attributes:
        path: the folder or the file.
        format: "peft", "gguf" or "diffusers".
        rank: the rank of all layers in the file.
        errors: layer -> `|W Q - W - B A|_F / |W Q - W|_F` in float64; 0 unless a smaller rank was requested. In a
            diffusers pipeline, the paths of layers start with the part.

    Example:
        >>> print(LoraResult(Path("out"), "peft", 8, {"q_proj": 0.01}))
        out: 1 layer as LoRA of rank 8 (peft), with an error of up to 1.0e-02 of the weight change
    """

    path: Path
    format: str
    rank: int
    errors: Mapping[str, float]

    def __str__(self) -> str:
        """A summary in one line."""
        count, error = f"{len(self.errors)} layer{'s' * (len(self.errors) != 1)}", max(self.errors.values())
        cut = f", with an error of up to {error:.1e} of the weight change" if error else ""
        return f"{self.path}: {count} as LoRA of rank {self.rank} ({self.format}){cut}"


def convert_to_lora(
    model: nn.Module,
    adapter_names: str | Iterable[str] | None = None,
    *,
    rank: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert adapters to a LoRA in PEFT's format, without approximation: `W Q = W + B A`.

    The factors are computed in float64, with the numerical rank of each layer's change, and balanced: `A` and `B` have
    the same singular values. The rank is at most `r`. An untrained adapter that does not change the weights
    becomes a LoRA of rank 1 with zeros.

    Args:
        model: a transformed model, whose adapters may be merged. It is not changed. With
            `fully_shard`, all processes must call this function.
        adapter_names: the adapters, in the order of the product `W Q_a Q_b`, each at its scale (`set_scale`); `None`
            for the active ones.
        rank: the largest rank of a layer, with the best approximation of the weight change; `None` for an exact LoRA.

    Returns:
        The configuration, as a dict with fields of `peft.LoraConfig`, and the tensors of `adapter_model.safetensors`,
        with PEFT's keys: factors in float32 on the CPU; `modules_to_save` and biases as trained.

    Raises:
        AdapterError: the model has no such adapters, `rank` is not positive, or parameters are not in memory.
        FoldError: a weight or a vector is not finite, or an adapter does not have a well-defined `Q` (see
            `hra_fx.fold`).
        UnsupportedLayerError: LoRA does not support a layer: a convolution with groups, a dilation or a padding mode
            other than zeros; a class whose forward is not a plain product with the weight; a layer that several modules
            share, or whose weight another module reads (see docs/files.md); or a layer that PEFT does not find by its
            name.

    Warns:
        HRAWarning: the adapters do not change any weight.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
        >>> config, tensors = convert_to_lora(model)
        >>> config["r"], config["target_modules"]
        (2, ['0'])
        >>> {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        {'base_model.model.0.lora_A.weight': (2, 6), 'base_model.model.0.lora_B.weight': (4, 2)}
    """
    adapter = lora_adapter(model, adapter_names, rank)
    _warn_if_unchanged([adapter])
    return peft_form(adapter, torch.float32)


def save_as_lora(
    model_or_pipeline: Any,
    path: str | os.PathLike[str],
    adapter_names: str | Iterable[str] | None = None,
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
) -> LoraResult:
    """Save adapters as a LoRA that PEFT, vLLM, llama.cpp, diffusers and other runtimes load; see docs/files.md.

    With `fully_shard`, all processes must call this function: they gather one layer at a time,
    and the first process writes.

    Args:
        model_or_pipeline: a transformed model, which is saved as a folder in PEFT's format; or a diffusers pipeline
            with transformed parts, or a UNet or transformer of diffusers, which is saved as a folder for
            `pipe.load_lora_weights`. It is not changed.
        path: the folder, created if needed; or a file: ".gguf" for llama.cpp, ".safetensors" for ComfyUI and kohya's
            scripts (diffusers loads it with `weight_name`).
        adapter_names: as in `convert_to_lora`. Parts of a pipeline without any of them are left out.
        rank: as in `convert_to_lora`.
        dtype: float32, float16 or bfloat16, as a torch dtype or its name; `None` for float32.

    Returns:
        The rank, and for each layer the error of a smaller rank.

    Raises:
        AdapterError, FoldError, UnsupportedLayerError: as in `convert_to_lora`; or the format does not support the
            model or a layer.
        CheckpointError: the files cannot be written. After any error, old files are unchanged.

    Warns:
        HRAWarning: the adapters do not change any weight.

    Example:
        >>> import tempfile
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = save_as_lora(model, folder, dtype="bfloat16")
        ...     sorted(os.listdir(folder)), result.rank
        (['adapter_config.json', 'adapter_model.safetensors'], 2)
    """
    checked, path = _dtype(dtype), output_folder(path)
    file_format = "gguf" if path.suffix.lower() == ".gguf" else "peft"
    if parts := parts_of(model_or_pipeline):
        file_format, adapters = "diffusers", adapters_of(parts, adapter_names, rank)
    else:
        adapters = {"": lora_adapter(model_or_pipeline, adapter_names, rank)}
        parts = {"": model_or_pipeline}
    if path.suffix.lower() in (*_PICKLES, ".gguf" if file_format == "diffusers" else ".safetensors"):
        raise AdapterError(
            f"{path}: GGUF files are for language models, single safetensors files for models of diffusers, and pickle "
            f"files are never written, got {type(model_or_pipeline).__name__}. Pass a folder."
        )
    tensors = [tensor for part in parts.values() for tensor in part.parameters()]
    result = on_first_rank(tensors, lambda: _write(adapters, path, file_format, checked))
    _warn_if_unchanged(adapters.values())
    return result


def _write(adapters: Mapping[str, LoraAdapter], path: Path, file_format: str, dtype: torch.dtype) -> LoraResult:
    """Write the adapter of each part of a pipeline, or under "" that of a single model; and return a summary."""
    old = path / CONFIG_NAME
    if old.is_file() and json.loads(old.read_text(encoding="utf-8")).get("peft_type") == "HRA":
        raise CheckpointError(f"{path}: contains an HRA adapter, which the LoRA would overwrite. Use another folder.")
    if file_format == "diffusers":
        write_diffusers(adapters, path, dtype)
    elif file_format == "gguf":
        write_gguf(adapters[""], path, dtype)
    else:
        config, tensors = peft_form(adapters[""], dtype)
        write(path, json.dumps(config, indent=2, sort_keys=True), tensors)
    layers = ((part, layer) for part, adapter in adapters.items() for layer in adapter.layers)
    errors = {f"{part}.{layer.path}".lstrip("."): layer.error for part, layer in layers}
    return LoraResult(path, file_format, max(adapter.rank for adapter in adapters.values()), errors)


def _warn_if_unchanged(adapters: Iterable[LoraAdapter]) -> None:
    if not any(layer.rank for adapter in adapters for layer in adapter.layers):
        text = "the adapters do not change any weight (untrained, or at scale 0): the LoRA is zero."
        warnings.warn(text, HRAWarning, stacklevel=3)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else torch.float32 if dtype is None else dtype
    if found not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise AdapterError(f"`dtype` must be one of {names}, got {dtype!r}.")
    return found
