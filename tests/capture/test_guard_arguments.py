"""Guard: arguments that a call may leave out. fx makes placeholders of them, which are never None."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from capture.checks import (
    adapt,
    assert_equals_oracle,
    assert_refused,
    assert_whole,
    differ,
    fresh,
    inputs,
    naive,
    spied,
)
from capture.models import Optional, Two
from torch import Tensor, nn


class Inner(Two):
    """A part whose argument is optional: how the model calls it is not known without a call."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if mask is None else hidden * mask)


class Outer(nn.Module):
    """Not traceable itself, so that the part is tried as a region of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.part(x, **kwargs) if x.sum() > -1e9 else x


class Positional(Two):
    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        hidden = self.first(x)
        for other in others:
            hidden = hidden + other
        return self.second(hidden)


class Keywords(Two):
    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * others["gain"] if "gain" in others else hidden)


class KeywordOnly(Two):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.second(self.first(x) * mask)


class NothingRequired(Two):
    def forward(self, x: Tensor | None = None) -> Tensor:
        x = torch.ones(2, 6, dtype=torch.float64) if x is None else x
        return self.second(self.first(x))


X, MASK = inputs(4, 6), inputs(4, 8, value=8)


def test_naive_trace_takes_an_optional_argument_for_given() -> None:
    base = fresh(Optional())
    graph = naive(base)
    with pytest.raises(TypeError, match="unsupported operand"):
        graph(X)
    assert differ(naive(base, concrete_args={"mask": None, "gain": 1.0})(X, None), base(X, MASK))


def test_the_model_may_have_optional_arguments_which_stay_at_their_defaults() -> None:
    adapted, base = adapt(Optional())
    assert_whole(adapted)
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3
    assert_equals_oracle(adapted, base, X, MASK)
    assert_equals_oracle(adapted, base, X, mask=MASK)
    assert_equals_oracle(adapted, base, X, gain=3.0)
    assert_equals_oracle(adapted, base, X, None)
    assert_equals_oracle(adapted, base, x=X)
    assert_equals_oracle(adapted, base, X, **{})
    assert spy.runs == 12, "only calls in which optional arguments have their defaults run the graph"


def test_a_part_may_not() -> None:
    part = fresh(Inner())
    with pytest.raises(TypeError, match="unsupported operand"):
        naive(part)(X)
    adapted, base = adapt(Outer(Inner()))
    assert_refused(adapted, "forward has optional arguments (mask), and no call is known that fixes them")
    assert_equals_oracle(adapted, base, X)
    assert_equals_oracle(adapted, base, X, mask=MASK)


class Unused(Two):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return self.second(self.first(x))


class UsedByADecorator(Two):
    @staticmethod
    def scaling(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, x: Tensor, **others: Any) -> Tensor:
            return forward(self, x * others.get("gain", 1.0), **others)

        return wrapper

    @scaling
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "runs"),
    [
        (Positional, (X, MASK, MASK), {}, 0),
        (Positional, (X,), {}, 3),
        (Keywords, (X,), {"gain": MASK}, 0),
        (Keywords, (X,), {}, 3),
        (KeywordOnly, (X,), {"mask": MASK}, 3),
        (KeywordOnly, (), {"x": X, "mask": MASK}, 3),
        (Unused, (X,), {"gain": MASK, "flag": object()}, 3),
        (UsedByADecorator, (X,), {"gain": 3.0}, 0),
        (UsedByADecorator, (X,), {}, 3),
    ],
)
def test_variadic_and_keyword_arguments_that_the_graph_was_not_made_for_run_the_forward(
    model: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], runs: int
) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    spy = spied(adapted, X, **({"mask": MASK} if model is KeywordOnly else {}))
    assert_equals_oracle(adapted, base, *args, **kwargs)
    assert spy.runs == runs


@pytest.mark.parametrize("args", [(), (X,)])
def test_a_forward_that_needs_nothing_refuses_the_region(args: tuple[Any, ...]) -> None:
    adapted, base = adapt(NothingRequired())
    assert_refused(adapted, "forward has no argument that every call must give")
    assert_equals_oracle(adapted, base, *args)


@pytest.mark.parametrize("model", [Positional, Keywords, NothingRequired])
def test_naive_trace_of_them_fails_or_is_wrong(model: type[nn.Module]) -> None:
    base = fresh(model())
    calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = (
        [((X, MASK), {})] if model is Positional else [((X,), {})]
    )
    calls += [((X,), {"gain": MASK})] if model is Keywords else [((), {})] if model is NothingRequired else []
    wrong = 0
    for args, kwargs in calls:
        try:
            wrong += differ(naive(base)(*args, **kwargs), base(*args, **kwargs))
        except Exception:  # whatever fx or the graph make of it
            wrong += 1
    assert wrong


class RequiredMask(Two):
    """A required argument that callers give as None: layer_norm takes that in silence."""

    def forward(self, x: Tensor, gain: Tensor | None) -> Tensor:
        hidden = self.first(x)
        if gain is not None:
            hidden = hidden * 2
        return self.second(nn.functional.layer_norm(hidden, (8,), gain) + hidden)


class Add(Two):
    def forward(self, x: Tensor, flag: bool) -> Tensor:
        hidden = self.first(x)
        if flag is True:
            hidden = hidden * 2
        return self.second(hidden)


class Same(Two):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.first(x)
        if x is y:
            hidden = hidden * 2
        return self.second(hidden + self.first(y))


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (RequiredMask, (X, MASK[0])),
        (RequiredMask, (X, None)),
        (Add, (X, True)),
        (Add, (X, False)),
        (Same, (X, X)),
        (Same, (X, X + 1)),
    ],
)
def test_required_arguments_of_which_the_identity_matters(model: type[nn.Module], args: tuple[Any, ...]) -> None:
    adapted, base = adapt(model())
    assert_equals_oracle(adapted, base, *args)


@pytest.mark.parametrize(("model", "args"), [(RequiredMask, (X, None)), (Add, (X, True)), (Same, (X, X))])
def test_naive_trace_answers_an_identity_question_for_good(model: type[nn.Module], args: tuple[Any, ...]) -> None:
    base = fresh(model())
    assert differ(naive(base)(*args), base(*args))


class Structured(Two):
    """A tuple and a dictionary of tensors, which a graph takes apart."""

    def forward(self, pair: tuple[Tensor, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
        left, right = pair
        hidden = self.first(left) * named["gain"]
        return {"out": self.second(hidden), "other": self.first(right)}


def test_structures_of_tensors_go_in_and_come_out() -> None:
    adapted, base = adapt(Structured())
    assert_equals_oracle(adapted, base, (X, X + 1), {"gain": MASK})
