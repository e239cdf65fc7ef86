"""Guard: a call of a layer is a node, with the hooks that the layer has; a forward may not change them for a call."""

from __future__ import annotations

from typing import Any

from capture.checks import adapt, assert_equals_oracle, assert_refused, inputs
from capture.models import Two
from torch import Tensor, nn


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


class HookedForAWhile(Two):
    """Puts a hook on a layer for one call."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        handle = self.act.register_forward_hook(double_output)
        hidden = self.act(self.first(x))
        handle.remove()
        return self.second(hidden)


def test_a_hook_that_the_forward_puts_on_for_a_call_refuses_the_region() -> None:
    adapted, base = adapt(HookedForAWhile())
    assert_refused(adapted, "act: its hooks are others for a call, which a graph does not do")
    assert_equals_oracle(adapted, base, inputs(4, 6))


class Unhooked(HookedForAWhile):
    """Takes all hooks off a layer for one call."""

    def forward(self, x: Tensor) -> Tensor:
        kept = dict(self.act._forward_hooks)
        self.act._forward_hooks.clear()
        hidden = self.act(self.first(x))
        self.act._forward_hooks.update(kept)
        return self.second(hidden)


def test_a_hook_that_the_forward_takes_off_for_a_call_refuses_the_region() -> None:
    model = Unhooked()
    model.act.register_forward_hook(double_output)
    adapted, base = adapt(model)
    assert_refused(adapted, "act: its hooks are others for a call, which a graph does not do")
    assert_equals_oracle(adapted, base, inputs(4, 6))
