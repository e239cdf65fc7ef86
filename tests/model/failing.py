"""What goes wrong in the middle of a step: a real Ctrl-C, or no memory; and how a whole fold looks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from model.many import assert_close
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hra_fx.model.state import record_of


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


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


@contextmanager
def ctrl_c_in(name: str, call: int = 1) -> Iterator[None]:
    """A real Ctrl-C at a call of a function of hra_fx."""
    calls = []

    def watch(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == name and "hra_fx" in frame.f_code.co_filename:
            calls.append(1)
            if len(calls) == call:
                ctrl_c()

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert len(calls) >= call, f"{name} was not called"


def folded(plain: nn.Module, model: nn.Module, wanted: dict[str, Tensor]) -> None:
    """The model is the plain one with these weights."""
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    assert record_of(model) is None
    for name, value in model.state_dict().items():
        assert_close(value, wanted.get(name, plain.state_dict()[name]), 1e-12)
