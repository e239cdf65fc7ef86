"""Guard: state of the process. A context is dropped from a graph, a question or a random draw is answered for good."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import (
    adapt,
    assert_close,
    assert_equals_oracle,
    assert_refused,
    differ,
    fresh,
    inputs,
    naive,
    oracle,
    seed,
)
from capture.models import Two
from capture.process_models import (
    AsksAutocast,
    AsksGrad,
    AsksGradByName,
    AsksInference,
    Autocast,
    AutocastDecorated,
    AutocastOff,
    Checkpoint,
    CustomFunction,
    CustomFunctionBoundBefore,
    EnableGrad,
    EnableGradDecorated,
    ForksRng,
    Inference,
    InferenceDecorated,
    NoGrad,
    NoGradDecorated,
    NumpyDice,
    PutsRngBack,
    PythonDice,
    ReentrantCheckpoint,
    Reseeds,
    SetGrad,
    SetGradCall,
    SetGradDecorated,
    TorchDice,
    UnusedDice,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hra_fx

X = inputs(4, 6)


@pytest.fixture(autouse=True)
def process_state_stays() -> Iterator[None]:
    """No test leaves grad mode or autocast other than it was, whatever it transforms."""
    yield
    leaked = not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert not leaked


CASES: list[tuple[type[nn.Module], str]] = [
    (Autocast, "it runs under its own autocast"),
    (AutocastOff, "it runs under its own autocast"),
    (AutocastDecorated, "it runs under its own autocast"),
    (NoGrad, "it runs under no_grad"),
    (NoGradDecorated, "it runs under no_grad"),
    (EnableGrad, "it runs under enable_grad"),
    (EnableGradDecorated, "it runs under enable_grad"),
    (SetGrad, "it sets grad mode"),
    (SetGradCall, "grad"),
    (SetGradDecorated, "it sets grad mode"),
    (Inference, "it runs under inference_mode"),
    (InferenceDecorated, "it runs under inference_mode"),
    (CustomFunction, "it calls a custom autograd function"),
    (CustomFunctionBoundBefore, "custom autograd function"),
    (Checkpoint, "it checkpoints activations"),
    (ReentrantCheckpoint, "custom autograd function"),
    (AsksGrad, "it asks whether grad is enabled"),
    (AsksGradByName, "is_grad_enabled"),
    (AsksInference, "it asks whether inference mode is on"),
    (AsksAutocast, "it asks whether autocast is on"),
    (PythonDice, "it draws random numbers outside of torch operators on its input"),
    (NumpyDice, "it draws random numbers outside of torch operators on its input"),
    (TorchDice, "it draws random numbers outside of torch operators on its input"),
    (UnusedDice, "it draws random numbers outside of torch operators on its input"),
    (Reseeds, "it sets the state of a random generator"),
    (ForksRng, "it sets the state of a random generator"),
    (PutsRngBack, "it sets the state of a random generator"),
]


@pytest.mark.parametrize(("model", "reason"), CASES, ids=[model.__name__ for model, _ in CASES])
def test_what_a_graph_cannot_hold_refuses_the_region(model: type[nn.Module], reason: str) -> None:
    adapted, base = adapt(model(), r=2)
    assert_refused(adapted, reason)
    _assert_right(adapted, base)


def _assert_right(adapted: nn.Module, base: nn.Module) -> None:
    """In grad mode, without, in inference mode, and under autocast."""
    assert_equals_oracle(adapted, base, X)
    plain = oracle(adapted, base)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_close(_seeded(adapted, X), _seeded(plain, X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = _seeded(adapted, X.float().double()), _seeded(plain, X.float().double())
    assert found.dtype == expected.dtype and found.requires_grad == _seeded(adapted, X).requires_grad
    assert (found.float() - expected.float()).abs().max() < 0.5 * expected.float().abs().max()


def _seeded(model: Callable[..., Any], *args: Any) -> Any:
    seed(4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # a checkpoint without grad mode
        return model(*args)


@pytest.mark.parametrize(
    "model", [Autocast, AutocastDecorated, NoGrad, NoGradDecorated, SetGrad, SetGradCall, SetGradDecorated, Inference]
)
def test_naive_trace_drops_a_context(model: type[nn.Module]) -> None:
    base = fresh(model())
    assert _gradient_differs(naive(base), base) or differ(naive(base)(X), base(X))


@pytest.mark.parametrize("model", [EnableGrad, EnableGradDecorated])
def test_naive_trace_drops_enable_grad(model: type[nn.Module]) -> None:
    base = fresh(model())
    graph = naive(base)
    with torch.no_grad():
        assert base(X).requires_grad and not graph(X).requires_grad


@pytest.mark.parametrize("model", [CustomFunction, CustomFunctionBoundBefore])
def test_naive_trace_drops_the_backward_of_a_custom_function(model: type[nn.Module]) -> None:
    base = fresh(model())
    graph = naive(base)
    assert not differ(graph(X), base(X)), "the outputs say nothing"
    assert _gradient_differs(graph, base)


@pytest.mark.parametrize("model", [Checkpoint, ReentrantCheckpoint])
def test_naive_trace_drops_a_checkpoint(model: type[nn.Module]) -> None:
    """It saves all activations: the part under the checkpoint is not run again in backward."""
    base = fresh(model())
    graph = naive(base)
    assert "checkpoint" not in graph.code.lower()


@pytest.mark.parametrize("model", [AsksGrad, AsksGradByName])
def test_naive_trace_answers_a_question_for_good(model: type[nn.Module]) -> None:
    base = fresh(model())
    graph = naive(base)
    with torch.no_grad():
        assert differ(graph(X), base(X))


@pytest.mark.parametrize("model", [PythonDice, NumpyDice, TorchDice])
def test_naive_trace_throws_the_dice_once(model: type[nn.Module]) -> None:
    graph = naive(fresh(model()))
    assert not differ(graph(X), graph(X)), "naive: the same number at every call"


@pytest.mark.parametrize("model", [Reseeds, ForksRng, PutsRngBack])
def test_naive_trace_forgets_the_seed(model: type[nn.Module]) -> None:
    base = fresh(model())
    assert not differ(base(X), base(X))
    graph = naive(base)
    assert differ(graph(X), graph(X))


def _gradient_differs(graph: nn.Module, base: nn.Module) -> bool:
    grads = []
    for model in (graph, base):
        model.zero_grad(set_to_none=True)
        model(X).sum().backward()
        grads.append(
            [torch.zeros(1) if p.grad is None else p.grad.clone() for _, p in sorted(model.named_parameters())]
        )
    return differ(*grads)


@pytest.mark.parametrize("model", [PythonDice, NumpyDice, TorchDice, Reseeds, UnusedDice])
def test_random_states_are_as_they_were(model: type[nn.Module]) -> None:
    subject = fresh(model())
    seed(3)
    config = hra_fx.HRAConfig(r=2, target_modules=["first", "second"], init_weights=False)
    hra_fx.transform(subject, config)
    after = random.random(), float(np.random.rand())
    seed(3)
    assert after == (random.random(), float(np.random.rand()))
    # torch's own generator moves by the start of the vectors, and by nothing else.
    seed(3)
    hra_fx.transform(fresh(Two()), config)
    expected = torch.rand(1)
    seed(3)
    hra_fx.transform(fresh(model()), config)
    assert torch.equal(torch.rand(1), expected)


class Quiet(Two):
    """Has all of it in its source, and runs none of it."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.checkpointing:
            hidden = checkpoint(torch.tanh, hidden, use_reentrant=False)
        return self.second(hidden)


def test_code_that_does_not_run_costs_nothing() -> None:
    adapted, base = adapt(Quiet())
    assert hra_fx.report(adapted).rows[0].region == "whole"
    assert_equals_oracle(adapted, base, X)


class Swallows(Two):
    """Catches whatever is raised in there, a refusal too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            with torch.no_grad():
                hidden = hidden * 2
        except Exception:
            hidden = hidden * 3
        return self.second(hidden)


def test_a_refusal_that_the_model_catches_is_a_refusal() -> None:
    adapted, base = adapt(Swallows())
    assert_refused(adapted, "it runs under no_grad")
    assert_equals_oracle(adapted, base, X)


def test_patches_are_gone_after_a_trace() -> None:
    def watched() -> list[Any]:
        enters = [kind.__enter__ for kind in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)]
        asks = [torch.is_grad_enabled, torch.is_autocast_enabled, torch.is_inference_mode_enabled, torch.is_tensor]
        return [*enters, *asks, torch.set_grad_enabled.__init__, torch.autograd.Function.apply, torch.manual_seed]

    before = watched()
    for model, _ in CASES:
        adapt(model())
    assert watched() == before


def test_other_threads_go_on_during_a_trace() -> None:
    import threading

    class Waits(Two):
        def forward(self, x: Tensor) -> Tensor:
            worker = threading.Thread(target=other)
            worker.start()
            worker.join()
            return self.second(self.first(x))

    seen: list[bool] = []

    def other() -> None:
        with torch.no_grad():
            seen.append(torch.is_grad_enabled())
        seen.append(torch.is_grad_enabled())

    adapted, _ = adapt(Waits())
    assert seen == [False, True] * (len(seen) // 2) and seen
    assert hra_fx.report(adapted).rows[0].region == "whole"
