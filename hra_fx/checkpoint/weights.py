"""The weights of an adapter, a safetensors file: read, and refused where it is damaged. Nothing here knows a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hra_fx.checkpoint.keys import VECTORS
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import REFLECTION

__all__ = ["non_finite", "read"]

# Two numbers to a byte, none of which can be infinite or NaN; torch computes nothing with them.
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, in memory of their own on the CPU, and its metadata.

    Raises:
        CheckpointError: the file cannot be read, is cut short or damaged, is in another format or empty; vectors (keys
            that end in "hra_u" or "hra_vectors") are not floating; a value is infinite or NaN. It names the file, and
            the key.

    >>> read(Path("nowhere", "adapter_model.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere/adapter_model.safetensors: cannot be read (No such file or directory...
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            # Cloned, since the mapped file would stay open with them and whoever writes into it would change them.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, it is no dict
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Give a file that can be read.") from error
    except SafetensorError as error:
        reason = f"is cut short or damaged, or is no safetensors file ({error})"
        raise CheckpointError(f"{path}: {reason}. Save or fetch it again.") from error
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors. Save the adapter again.")
    for key, tensor in tensors.items():
        _check(path, key, tensor)
    return tensors, metadata


def _check(path: Path, key: str, tensor: Tensor) -> None:
    if key.endswith((REFLECTION, VECTORS)) and not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {key!r} is {tensor.dtype}, vectors are floating. Save the adapter again.")
    count = non_finite(tensor)
    if count:
        reason = f"{key!r} has {count} of {tensor.numel()} values that are infinite or NaN"
        raise CheckpointError(f"{path}: {reason}. Go back to a file from before the training diverged.")


def non_finite(tensor: Tensor) -> int:
    """How many values of a tensor of any dtype are infinite or NaN.

    >>> non_finite(torch.tensor([1.0, float("nan"), float("inf")]))
    2
    """
    if tensor.dtype is _PACKED or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # Not every float of eight bits has an isfinite.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return int(wide.isfinite().logical_not().sum())
