"""What the tests of `transform(..., trace=True)` share: an input, a configuration, and what torch.fx refuses."""

from __future__ import annotations

from typing import Any

import torch
from layers.checking import normal
from torch import Tensor
from tracing.models import Two

import hra_fx

X = normal(7, 4, 6)


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 3, "target_modules": list(targets or ("first", "second"))} | fields))


class Branches(Two):
    """torch.fx refuses it; torch.export captures one call."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.first(x)
        hidden = hidden * 2 if hidden.shape[0] > 2 else hidden
        return {"out": self.second(torch.relu(hidden)) * scale}


class Straight(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
