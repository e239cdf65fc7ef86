"""Check the arguments of an export as LoRA, and translate fields of HRA to those of LoRA."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from hra_fx.checkpoint.folder import WEIGHTS_NAME
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import AdapterError, CheckpointError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Files of models, and weights of adapters, of PEFT and diffusers.
_OF_MODELS = ("config.json", "model_index.json")
_OF_ADAPTERS = (WEIGHTS_NAME, "pytorch_lora_weights.safetensors")
#: HRA's `bias` -> LoRA's, from the least to the most.
_BIASES = {"none": "none", "hra_only": "lora_only", "all": "all"}


def check_rank(rank: int | None) -> None:
    """Check the largest rank of a layer.

    Raises:
        AdapterError: it is not a positive int or `None`.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"`rank` must be a positive int or None, got {rank!r}.")


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of factors.

    Raises:
        AdapterError: it is not one that LoRA adapters are stored in.

    >>> check_dtype("bfloat16"), check_dtype(None)
    (torch.bfloat16, torch.float32)
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else torch.float32 if dtype is None else dtype
    if found not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise AdapterError(f"`dtype` must be one of {names}, got {dtype!r}.")
    return found


def lora_bias(biases: Iterable[str]) -> str:
    """LoRA's `bias` for several adapters with HRA's.

    >>> lora_bias(["none", "hra_only"])
    'lora_only'
    """
    return _BIASES[max(biases, key=list(_BIASES).index)]


def check_path(path: Path) -> None:
    """Refuse a folder in which a LoRA would do harm.

    Raises:
        CheckpointError: it holds a model, which `from_pretrained` would load with the LoRA on top; or an HRA adapter,
            which cannot be computed from its LoRA.
    """
    check_no_model(path)
    if _peft_type(path / CONFIG_NAME) == "HRA":
        raise CheckpointError(
            f"{path}: contains an HRA adapter, which the LoRA would overwrite and cannot restore. Choose another "
            "folder."
        )


def check_no_model(path: Path) -> None:
    """Refuse a folder with a model.

    Raises:
        CheckpointError: there is one.
    """
    present = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    model = next((name for name in present if name in _OF_MODELS or _is_weights(name)), None)
    if model:
        raise CheckpointError(
            f"{path}: contains a model ({model}), and from_pretrained would load the adapter with it. Choose another "
            "folder."
        )


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name not in _OF_ADAPTERS


def _peft_type(config: Path) -> object:
    try:
        entries = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entries.get("peft_type") if isinstance(entries, dict) else None
