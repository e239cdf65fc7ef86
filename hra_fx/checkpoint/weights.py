"""Read and check the weights of an adapter, a safetensors file; independent of any model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hra_fx.checkpoint.keys import PREFIX, VECTORS
from hra_fx.errors import CheckpointError
from hra_fx.layers.target import REFLECTION

__all__ = ["non_finite", "opened", "read", "read_prefixed"]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, copied to CPU memory, and its metadata.

    Raises:
        CheckpointError: the file cannot be read, is damaged, empty or not a safetensors file; vectors (keys that end in
            "hra_u" or "hra_vectors") are not floating point; a value is infinite or NaN. The message names the file
            and the key.

    >>> read(Path("nowhere", "adapter_model.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere/adapter_model.safetensors: cannot read the file (No such file or directory...
    """
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        # Cloned: otherwise they would keep the file mapped, and change with it.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, not a dict
    if not tensors:
        raise CheckpointError(f"{path}: the file has no tensors. Save the adapter again.")
    for key, tensor in tensors.items():
        _check(path, key, tensor)
    return tensors, metadata


@contextlib.contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, opened by `safetensors.safe_open`, which checks its header and size.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or not a safetensors file.
    """
    try:
        file = safe_open(path, framework=framework)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error}).") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated, damaged, or not a safetensors file ({error}). Save or download it again."
        ) from error
    with file as reader:
        yield reader


def read_prefixed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read`, with PEFT's prefix for all keys; some writers leave it out.

    Raises:
        CheckpointError: also if a key is there with and without the prefix.
    """
    tensors, metadata = read(path)
    twice = sorted(key for key in tensors if f"{PREFIX}{key}" in tensors)
    if twice:
        raise CheckpointError(
            f"{path}: duplicate key {twice[0]}, with and without the prefix {PREFIX!r}. Save the adapter again."
        )
    return {key if key.startswith(PREFIX) else f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}, metadata


def _check(path: Path, key: str, tensor: Tensor) -> None:
    if key.endswith((REFLECTION, VECTORS)) and not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: {key!r} must have a floating-point dtype, got {tensor.dtype}. Save the adapter again."
        )
    count = non_finite(tensor)
    if count:
        raise CheckpointError(
            f"{path}: {key!r} has {count} of {tensor.numel()} values that are infinite or NaN. Use a file from before "
            "the training diverged."
        )


def non_finite(tensor: Tensor) -> int:
    """Number of values that are infinite or NaN, for a tensor of any dtype.

    >>> import torch
    >>> non_finite(torch.tensor([1.0, float("nan"), float("inf")]))
    2
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # isfinite is not implemented for every 8-bit float.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return int(wide.isfinite().logical_not().sum())
