"""Errors in the middle of a step, and a check of a complete fold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from model.many import assert_close
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hra_fx.model.state import get_state


class At(TorchFunctionMode):
    """Does something at one call of a tensor's method, before the call itself; `calls` counts them."""

    def __init__(self, method: Any, call: int, do: Callable[[], None]) -> None:
        super().__init__()
        self.method, self.call, self.do, self.calls = method, call, do, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.method:
            self.calls += 1
            if self.calls == self.call:
                self.do()
        return func(*args, **(kwargs or {}))


def no_memory() -> None:
    raise torch.OutOfMemoryError("no memory is left.")


def folded(plain: nn.Module, model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """The model is the plain one with these weights."""
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    assert get_state(model) is None
    for name, value in model.state_dict().items():
        assert_close(value, wanted.get(name, plain.state_dict()[name]), 1e-12)
