"""The outputs of a model as named tensors, and their comparison."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

#: Allowed difference, relative to the largest value of a tensor, where nothing is known of the model's own noise.
TIGHT = {torch.float64: 1e-9, torch.float32: 1e-5}
#: A model that is noisier than this cannot be judged.
LOOSEST = 2e-2


class Differs(Exception):
    """Two outputs, buffers or gradients differ; the message says where and by how much."""


def seed(value: int) -> None:
    """Seed everything that a model may draw from."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Inputs with their floating-point tensors in `dtype`."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def flat(value: Any) -> dict[str, Tensor]:
    """Name -> tensor, of an output however it is nested."""
    found = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return {f"output {index}": tensor for index, tensor in enumerate(found)}


def distances(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> largest difference, relative to the largest value that is wanted there."""
    if actual.keys() != wanted.keys():
        odd = sorted(actual.keys() ^ wanted.keys())
        raise Differs(f"one has {odd[:3]}, the other not")
    found = {}
    for name, want in wanted.items():
        got = actual[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise Differs(f"{name}: {tuple(got.shape)} {got.dtype}, where {tuple(want.shape)} {want.dtype} is wanted")
        found[name] = _distance(name, got.detach(), want.detach())
    return found


def _distance(name: str, got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    if not (want.is_floating_point() or want.is_complex()):
        if not torch.equal(got, want):
            raise Differs(f"{name}: {int((got != want).sum())} of {want.numel()} integers differ")
        return 0.0
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)):
        raise Differs(f"{name}: not finite in one, finite in the other")
    scale = float(want[finite].abs().max()) if bool(finite.any()) else 0.0
    gap = float((got[finite] - want[finite]).abs().max()) if bool(finite.any()) else 0.0
    return gap / scale if scale else gap


def check_usable(output: Mapping[str, Tensor]) -> None:
    """Refuse an output that cannot be compared: no floating-point value, or values that are mostly not finite."""
    values = [tensor for tensor in output.values() if tensor.is_floating_point() and tensor.numel()]
    if not values:
        raise Differs("the base model returns no floating-point value, so there is nothing to compare")
    if not all(float(torch.isfinite(tensor).double().mean()) > 0.3 for tensor in values):
        raise Differs("the base model returns values that are not finite, so there is nothing to compare")
