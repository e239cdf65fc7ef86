"""Check the arguments of an export as LoRA, and translate fields of HRA to those of LoRA."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hra_fx.errors import AdapterError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
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
