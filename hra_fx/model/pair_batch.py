"""Vectors with the same shape, which are converted to pair coordinates during a step of the optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.compat import copy_all
from hra_fx.functional.pairs import from_pairs, gradients_to_pairs, start_length, to_pairs
from hra_fx.kernels.distributed import as_dtensor
from hra_fx.layers.sharding import is_dtensor, local_tensor


class PairBatch:
    """Vectors with the same shape, converted together: this takes a few operators for any number of layers."""

    def __init__(self, vectors: list[nn.Parameter], difference: float) -> None:
        """Compute pair coordinates. This does not change anything, so an error here leaves the vectors unchanged."""
        self.constants = start_length(*vectors[0].shape[-2:]), difference
        self.vectors, self.gradients = vectors, [one.grad for one in vectors if one.grad is not None]
        self.values = [local_tensor(one) for one in vectors]
        self.before = torch.stack(self.values)
        self.pairs = to_pairs(self.before, *self.constants)
        made = gradients_to_pairs(torch.stack([local_tensor(one) for one in self.gradients]), *self.constants)
        self.made = [_like(one, own) for one, own in zip(made.unbind(), self.gradients, strict=True)]

    def enter(self) -> None:
        """Write pair coordinates into the parameters, and set their gradients."""
        copy_all(self.values, list(self.pairs.unbind()))
        for vectors, gradient in zip(self.vectors, self.made, strict=True):
            vectors.grad = gradient

    def leave(self) -> None:
        """Add the change of the step to the vectors, so that unchanged vectors keep their exact values."""
        values = self.before
        try:
            values = self.before + from_pairs(torch.stack(self.values).sub_(self.pairs), *self.constants)
        finally:
            copy_all(self.values, list(values.unbind()))
            for vectors, made, own in zip(self.vectors, self.made, self.gradients, strict=True):
                if vectors.grad is made:
                    vectors.grad = own


def _like(values: Tensor, other: Any) -> Any:
    """Distribute the local part of a tensor like another tensor."""
    return as_dtensor(values, other.device_mesh, other.placements, other.shape) if is_dtensor(other) else values
