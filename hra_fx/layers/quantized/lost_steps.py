"""Warn about 16-bit vectors that are trained on a quantized weight, as TRL's trainers cast them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from hra_fx.errors import HRAWarning
from hra_fx.kernels.dispatch import is_plain, is_plain_eager

_TEXT = (
    "the trained vectors of a quantized model are {dtype}, so rounding undoes most optimizer steps at usual learning "
    "rates. TRL's trainers cast them. Cast them back after creating the trainer: for each parameter of trainer.model "
    "that requires a gradient, parameter.data = parameter.data.float()."
)


def warn_of_lost_steps(x: Tensor, vectors: Iterable[Tensor]) -> None:
    """Warn if 16-bit vectors are trained.

    For `r=8`, entries start at up to 0.35, where bfloat16 values are 1e-3 apart; AdamW changes them by about the
    learning rate.

    Args:
        x: the input of their layer.
        vectors: those of its active adapters.

    Warns:
        HRAWarning: they are trained and 16-bit. This is not checked under a compiler or tracer.
    """
    if not torch.is_grad_enabled() or not is_plain(x) or not is_plain_eager():
        return
    for one in vectors:
        if one.dtype.itemsize < 4 and one.requires_grad:
            warnings.warn(_TEXT.format(dtype=one.dtype), HRAWarning, stacklevel=2)
