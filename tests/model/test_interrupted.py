"""An interrupt (Ctrl-C) in the middle of a fold or an unmerge leaves a model that computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import hra_fx
from hra_fx import HRAConfig

X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class InterruptAfter(TorchFunctionMode):
    """Raises `KeyboardInterrupt` once, after the n-th `copy_`, where a signal that came during it is delivered."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.copy_:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return result


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double()
    targets = [str(index) for index in range(4)]
    return hra_fx.transform(model, HRAConfig(r=3, target_modules=targets, init_weights=False))


def merged() -> nn.Module:
    model = adapted()
    hra_fx.merge_adapter(model)
    return model


@pytest.mark.parametrize(
    ("make", "act"), [(adapted, hra_fx.fold), (merged, hra_fx.unmerge_adapter), (merged, hra_fx.fold)]
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_model_computes_the_same_and_the_call_can_be_repeated(
    make: Callable[[], nn.Module], act: Callable[[nn.Module], object], n: int
) -> None:
    model = make()
    before = model(X)
    with pytest.raises(KeyboardInterrupt), InterruptAfter(n):
        act(model)
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-13)
    if act is hra_fx.fold:
        act(model)
        assert not [name for name in model.state_dict() if "hra_u" in name]
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-13)
