"""Peak memory of `fold`, `merge_adapter` and `verify=True` on a model of many equal layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import config
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hra_fx

WIDTH = 64
#: Bytes of one weight in float64, which a fold computes with.
LAYER = WIDTH * WIDTH * 8


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, and still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in before | self.seen:
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, identity: int, size: int) -> None:
        self.seen.discard(identity)
        self.live -= size


def peak(act: Callable[[nn.Module], object], layers: int, dtype: torch.dtype) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(layers)))
    hra_fx.transform(model, config(*map(str, range(layers)), init_weights=False))
    with Allocated() as allocated:
        act(model)
    return allocated.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fold_holds_a_few_copies_of_one_layer(dtype: torch.dtype) -> None:
    few, many = peak(hra_fx.fold, 4, dtype), peak(hra_fx.fold, 40, dtype)
    assert 0 < few < 6 * LAYER
    assert many < few + LAYER
    assert peak(lambda model: hra_fx.plan_fold(model).apply(), 40, dtype) < 6 * LAYER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_holds_one_copy_of_each_base_weight(dtype: torch.dtype) -> None:
    few, many = peak(hra_fx.merge_adapter, 4, dtype), peak(hra_fx.merge_adapter, 40, dtype)
    weight = WIDTH * WIDTH * dtype.itemsize
    assert many < few + 36 * weight + LAYER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verification_holds_a_copy_and_its_gradients_in_float64(dtype: torch.dtype) -> None:
    layers = 40
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(layers)))
    with Allocated() as allocated:
        names = map(str, range(layers))
        hra_fx.transform(model, config(*names), verify=True, example_inputs=torch.randn(2, WIDTH, dtype=dtype))
    assert allocated.peak < 2 * layers * LAYER + 16 * LAYER
