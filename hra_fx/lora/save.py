"""Convert adapters to LoRA: of a model in memory (`convert_to_lora`, `save_as_lora`) or of files (`convert_files`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.arguments import Source, base_folder
from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.sharding import on_first_rank
from hra_fx.lora.adapter import LoraAdapter
from hra_fx.lora.diffusers_format import adapters_of, part_of_class, parts_of
from hra_fx.lora.from_files import read_as_lora
from hra_fx.lora.from_model import lora_adapter
from hra_fx.lora.peft_format import peft_form
from hra_fx.lora.write import LoraResult, Output, check_dtype, check_lora, unchanged, write_lora


def convert_to_lora(
    model: nn.Module,
    adapter_names: str | Iterable[str] | None = None,
    *,
    rank: int | None = None,
    rank_pattern: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert adapters to a LoRA in PEFT's format, without approximation: `W Q = W + B A`.

    The factors are computed in float64, with the numerical rank of each layer's change, and balanced: `A` and `B` have
    the same singular values. The rank is at most `r`; with an anchor, it is at most `r + 1` for odd ranks and `2 r` for
    Gram-Schmidt. An untrained adapter does not change the weights and becomes a LoRA of rank 1 with zeros.

    Args:
        model: a transformed model; it is not changed. Adapters may be merged. With `fully_shard` and tensor
            parallelism, all processes must call this function.
        adapter_names: the adapters, in the order of the product `W Q_a Q_b`, each at its scale (`set_scale`); `None`
            for the active ones.
        rank: the largest rank of a layer, with the best approximation of the weight change; `None` for an exact LoRA.
        rank_pattern: keep each layer's own rank, with PEFT's `rank_pattern` and `alpha_pattern`. By default, all layers
            have the same rank, padded with zeros, because servers read a single rank and alpha.

    Returns:
        The configuration, as a dict with fields of `peft.LoraConfig`, and the tensors of `adapter_model.safetensors`,
        with PEFT's keys: factors in float32 on the CPU; `modules_to_save` and biases as trained.

    Raises:
        AdapterError: the model has no such adapters, `rank` is not positive, parameters are not in memory, or a tensor
            is not finite.
        FoldError: an adapter does not have a well-defined `Q` (see `hra_fx.fold`).
        UnsupportedLayerError: LoRA does not support a layer: a convolution with groups, a dilation or a padding mode
            other than zeros; a class whose forward is not a plain product with the weight; a layer that several modules
            share, or whose weight another module reads (see docs/serving.md); or a layer that PEFT does not find by its
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
    for text in unchanged([adapter]):
        warnings.warn(text, HRAWarning, stacklevel=2)
    return peft_form(adapter, torch.float32, rank_pattern=rank_pattern)


def save_as_lora(
    model_or_pipeline: Any,
    path: str | os.PathLike[str],
    adapter_names: str | Iterable[str] | None = None,
    *,
    rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    rank_pattern: bool = False,
    check: str | None = None,
) -> LoraResult:
    """Save adapters as a LoRA that PEFT, vLLM, llama.cpp, diffusers and other runtimes load; see docs/serving.md.

    With `fully_shard` and tensor parallelism, all processes must call this function: they gather one layer at a time,
    and the first process writes.

    Args:
        model_or_pipeline: a transformed model, which is saved as a folder in PEFT's format; or a diffusers pipeline
            with transformed parts, or a UNet or transformer of diffusers, which is saved as a folder for
            `pipe.load_lora_weights`. It is not changed.
        path: the folder, created if needed; or a file that ends in ".gguf", for llama.cpp.
        adapter_names: as in `convert_to_lora`. Parts of a pipeline without any of them are left out.
        rank: as in `convert_to_lora`.
        dtype: float32, float16 or bfloat16, as a torch dtype or its name; `None` for float32.
        rank_pattern: as in `convert_to_lora`; only for PEFT's format.
        check: the name of a server, such as "vllm", to warn about anything in this adapter that the server does not
            accept.

    Returns:
        The rank of each layer, the error of a smaller rank and the rounding error of `dtype`.

    Raises:
        AdapterError, FoldError, UnsupportedLayerError: as in `convert_to_lora`; or the format does not support the
            model or a layer.
        CheckpointError: the files cannot be written. After any error, old files are unchanged.

    Warns:
        HRAWarning: the adapters do not change any weight; or the server does not accept something (`check`).

    Example:
        >>> import tempfile
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"], init_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = save_as_lora(model, folder, dtype="bfloat16")
        ...     sorted(os.listdir(folder)), result.rank, result.rows[0].rounding < 0.01
        (['adapter_config.json', 'adapter_model.safetensors'], 2, True)
    """
    chosen = check_dtype(dtype)
    file_format = "gguf" if Path(path).suffix.lower() == ".gguf" else "peft"
    if file_format == "gguf" and not isinstance(model_or_pipeline, nn.Module):
        name = type(model_or_pipeline).__name__
        raise AdapterError(f"GGUF files are for language models, got {name}. Pass a folder to save a pipeline.")
    parts = parts_of(model_or_pipeline) if file_format == "peft" else {}
    if parts:
        file_format, adapters = "diffusers", adapters_of(parts, adapter_names, rank)
    else:
        adapters = {"": lora_adapter(model_or_pipeline, adapter_names, rank)}
        parts = {"": model_or_pipeline}
    output = Output(Path(path), file_format, chosen, rank_pattern, check)
    tensors = [tensor for part in parts.values() for tensor in part.parameters()]
    result = on_first_rank(tensors, lambda: write_lora(adapters, output))
    for text in result.warnings:
        warnings.warn(text, HRAWarning, stacklevel=2)
    return result


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
    """Convert adapters on disk, applied in order, to one LoRA on disk, without loading the model.

    Args:
        adapters: as in `read_as_lora`, like `base`, `columns` and `progress`; other arguments as in `save_as_lora`.
        base: the base model.
        out: a folder, in diffusers' format if the base is a UNet or transformer of diffusers, otherwise in PEFT's
            format; or a file that ends in ".gguf".

    Raises:
        AdapterError, CheckpointError, FoldError, UnsupportedLayerError: see `read_as_lora` and `save_as_lora`.
    """
    chosen, path = check_dtype(dtype), Path(out)
    to_gguf = path.suffix.lower() == ".gguf"
    part = "" if to_gguf else part_of_class(Architecture(base_folder(base)).entries.get("_class_name")) or ""
    output = Output(path, "gguf" if to_gguf else "diffusers" if part else "peft", chosen, rank_pattern, check)

    def check_first(adapter: LoraAdapter) -> None:
        check_lora({part: adapter}, output)

    adapter = read_as_lora(adapters, base, rank=rank, columns=columns, progress=progress, check=check_first)
    return write_lora({part: adapter}, output)
