"""Guard: what hangs on a module beside its class's forward is lost when the module is dissolved into a graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from capture.checks import (
    adapt,
    assert_close,
    assert_equals_oracle,
    assert_refused,
    assert_whole,
    differ,
    fresh,
    inputs,
    naive,
    oracle,
)
from capture.models import Scale, Two
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import hra_fx

X = inputs(4, 6)


class Middle(Two):
    """Two sites around a child that a graph would dissolve."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.middle = Scale() if middle is None else middle

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def double_input(module: nn.Module, args: Any) -> tuple[Tensor]:
    return (args[0] * 2,)


def double_grad(module: nn.Module, grad_input: Any, grad_output: Any) -> tuple[Tensor]:
    return (grad_input[0] * 2,)


def double_grad_before(module: nn.Module, grad_output: Any) -> tuple[Tensor]:
    return (grad_output[0] * 2,)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(double_output),
    "pre": lambda module: module.register_forward_pre_hook(double_input),
    "backward": lambda module: module.register_full_backward_hook(double_grad),
    "backward pre": lambda module: module.register_full_backward_pre_hook(double_grad_before),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_naive_trace_runs_no_hook_at_calls(kind: str) -> None:
    base = fresh(Middle())
    HOOKS[kind](base.middle)
    graph = naive(base)
    plain = fresh(Middle())
    results = []
    for model in (graph, base, plain):
        model.zero_grad(set_to_none=True)
        output = model(X)
        output.sum().backward()
        results.append((output.detach(), model.first.weight.grad))
    wrong_output, wrong_grad = (not torch.allclose(results[0][index], results[1][index]) for index in (0, 1))
    registered_later = naive(plain)
    HOOKS[kind](registered_later.middle if hasattr(registered_later, "middle") else nn.Identity())
    assert not differ(registered_later(X), plain(X)), "naive: a hook that comes later never runs"
    assert wrong_output or wrong_grad or kind in ("forward", "pre"), "those two are traced along, and stay for ever"


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_inside_refuse_the_region(kind: str) -> None:
    model = Middle()
    handle = HOOKS[kind](model.middle)
    adapted, base = adapt(model)
    assert_refused(adapted, "middle: it has hooks, which would not run")
    assert_equals_oracle(adapted, base, X)
    handle.remove()
    base.middle._forward_hooks.clear(), base.middle._forward_pre_hooks.clear()
    base.middle._backward_hooks.clear(), base.middle._backward_pre_hooks.clear()
    assert_equals_oracle(adapted, base, X)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["", "first", "second"])
def test_hooks_on_the_model_and_on_sites_may_stay(kind: str, path: str) -> None:
    model = Middle()
    HOOKS[kind](model.get_submodule(path))
    adapted, base = adapt(model)
    x = inputs(4, 6).requires_grad_()
    assert_equals_oracle(adapted, base, x)
    assert_equals_oracle(adapted, base, x)


def test_an_instance_forward_inside_refuses_the_region() -> None:
    model = Middle()
    model.middle.forward = types.MethodType(lambda self, x: torch.sin(x) * self.rate, model.middle)
    adapted, _ = adapt(model)
    assert_refused(adapted, "middle: its forward is set on the instance")
    base = Middle()
    base = fresh(base)
    base.middle.forward = types.MethodType(lambda self, x: torch.sin(x) * self.rate, base.middle)
    expected = oracle(adapted, base)
    assert not differ(adapted(X).detach(), expected(X).detach())


def test_an_instance_forward_of_the_model_refuses_the_region() -> None:
    model = Two()
    model.forward = types.MethodType(lambda self, x: self.second(torch.sin(self.first(x))), model)
    adapted, _ = adapt(model)
    assert_refused(adapted, "its forward is set on the instance, and a class cannot override that")
    plain = oracle(adapted, fresh(Two()))
    assert not differ(adapted(X).detach(), plain.second(torch.sin(plain.first(X))).detach())


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Checkpointable(nn.Module):
    """The other mark of the same: the two attributes that transformers sets."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("part", [Layer, Checkpointable])
def test_a_layer_that_may_checkpoint_is_not_dissolved(part: type[nn.Module]) -> None:
    adapted, base = adapt(Middle(part()))
    assert "middle: it may checkpoint its activations, which would not happen" in _reason_of(adapted, "first")
    assert_equals_oracle(adapted, base, X)


def test_a_layer_that_checkpoints_runs_again_in_backward() -> None:
    """Switched on after the transform, it does what it does in the base model."""
    adapted, base = adapt(Middle(Layer()))
    plain = oracle(adapted, base)
    runs, results = [], []
    for model in (adapted, plain):
        layer = model.middle
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
            f, *args, use_reentrant=False
        )
        count: list[int] = []
        layer.up.register_forward_hook(lambda *_, count=count: count.append(1))
        x = X.clone().requires_grad_()
        output = model.train()(x)
        output.sum().backward()
        runs.append(len(count))
        results.append([output.detach(), x.grad])
    assert runs == [2, 2]
    assert_close(*results)
    assert "checkpoint" not in naive(plain).code, "naive: the checkpoint is gone"


class Recorded(Middle):
    """As transformers' models name the classes whose outputs they collect."""

    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": Scale}


class RecordedInList(Middle):
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": [types.SimpleNamespace(target_class=Scale)]}


@pytest.mark.parametrize("model", [Recorded, RecordedInList])
def test_classes_whose_outputs_transformers_records_are_not_dissolved(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "middle: transformers records its outputs by hooks, which would not run")
    assert_equals_oracle(adapted, base, X)
    seen: list[Tensor] = []
    adapted.middle.register_forward_hook(lambda module, args, output: seen.append(output))
    adapted(X)
    assert len(seen) == 1


class Unused(Two):
    """Holds parameters that its forward does not use; whoever does knows another way through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class UnusedChild(Middle):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class UnusedSite(Two):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(8, 8)
        self.use_aside = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(self.aside(hidden) if self.use_aside else hidden)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Unused, "the module itself has parameters or buffers, and is not used by the traced forward"),
        (UnusedChild, "middle has parameters or buffers, and is not used by the traced forward"),
        (UnusedSite, "aside"),
    ],
)
def test_unused_state_refuses_the_region(model: type[nn.Module], reason: str) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, reason)
    assert_equals_oracle(adapted, base, X)


def test_naive_trace_drops_what_is_not_used() -> None:
    base = fresh(UnusedSite())
    assert set(naive(base).state_dict()) < set(base.state_dict()), "naive: keys are lost"
    graph = naive(base)
    base.use_aside = True
    assert differ(graph(X), base(X))
    adapted, base = adapt(UnusedSite())
    adapted.use_aside = base.use_aside = True
    assert_equals_oracle(adapted, base, X)


def _reason_of(model: nn.Module, path: str) -> str:
    return next(row.region_reason for row in hra_fx.report(model).rows if row.path == path)


class ReadsWeight(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.second.weight, self.second.bias)


class ReadsWeightInHelper(ReadsWeight):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def last(self, hidden: Tensor) -> Tensor:
        return hidden @ self.second.weight.t() + self.second.bias


def read(layer: nn.Linear, hidden: Tensor) -> Tensor:
    return F.linear(hidden, layer.weight, layer.bias)


class ReadsWeightElsewhere(Two):
    """By a function of the file: only the graph tells."""

    def forward(self, x: Tensor) -> Tensor:
        return read(self.second, torch.tanh(self.first(x)))


class ReadsAndCalls(Two):
    """An orthogonality penalty, say, beside the call."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(self.first(x)), self.second.weight.square().sum(dim=0)


@pytest.mark.parametrize("model", [ReadsWeight, ReadsWeightInHelper, ReadsWeightElsewhere, ReadsAndCalls])
def test_a_site_whose_weight_is_read_is_reflected_where_it_is_read(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    assert [row.on_weight for row in hra_fx.report(adapted)] == [False, True]
    assert_equals_oracle(adapted, base, X)
    adapted, base = adapt(model(), ["first"])
    assert_equals_oracle(adapted, base, X)


def test_reflections_of_such_a_site_would_do_nothing() -> None:
    """What that is for: swapping the layer alone, as module wrappers do, leaves the output as it was."""
    base = fresh(ReadsWeight())
    wrapped = fresh(ReadsWeight())
    wrapped.second.register_forward_pre_hook(double_input)
    assert not differ(wrapped(X), base(X))


class AsksWeight(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(self.first.weight.dtype))
        return self.second(hidden.to(self.second.weight.device))


def test_dtype_and_device_of_a_weight_may_be_asked() -> None:
    adapted, base = adapt(AsksWeight())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)


class CalledOwn(nn.Linear):
    """A Linear that does more than its forward when called."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class OwnCall(Two):
    def __init__(self) -> None:
        super().__init__()
        self.first = CalledOwn(6, 8)


class OwnCallBeside(Two):
    """The same as a child that is no site."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = CalledOwn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


def test_a_site_with_a_call_of_its_own_is_refused_or_right() -> None:
    try:
        adapted, base = adapt(OwnCall())
    except hra_fx.UnsupportedLayerError as error:
        assert "first" in str(error)
        return
    assert_equals_oracle(adapted, base, X)


def test_a_leaf_with_a_call_of_its_own_does_it_once() -> None:
    adapted, base = adapt(OwnCallBeside(), ["first", "second"])
    assert_equals_oracle(adapted, base, X)


class CatchesRefusal(Middle):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            hidden = self.middle(hidden)
        except Exception:
            hidden = hidden * 3
        return self.second(hidden)


def test_a_refused_child_that_the_model_catches_is_a_refusal() -> None:
    model = CatchesRefusal()
    model.middle.register_forward_hook(double_output)
    adapted, base = adapt(model)
    assert_equals_oracle(adapted, base, X)
    assert_refused(adapted, "middle: it has hooks, which would not run")
