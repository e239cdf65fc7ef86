"""Guard: what a forward writes. A naive trace writes it once, often with a proxy, and calls never again."""

from __future__ import annotations

import collections
import copy
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import (
    adapt,
    assert_equals_oracle,
    assert_refused,
    fresh,
    inputs,
)
from capture.models import Two
from torch import Tensor, fx, nn

import hra_fx

X = inputs(4, 6)


class Helper:
    """A plain object that a module holds."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []
        self.inner = types.SimpleNamespace(calls=0)


class Slotted:
    """A plain object without a `__dict__`."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Writes(Two):
    """Counts its calls in `state`; the count goes into the output where `scales` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.state = self.make()

    def make(self) -> Any:
        return 0

    def count(self) -> None:
        self.state += 1

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.second(self.first(x))


class Counter(Writes):
    pass


class GrowingList(Writes):
    make = staticmethod(list)

    def count(self) -> None:
        self.state.append(1)


class GrowingDict(Writes):
    make = staticmethod(dict)

    def count(self) -> None:
        self.state[len(self.state)] = 1


class GrowingSet(Writes):
    make = staticmethod(set)

    def count(self) -> None:
        self.state.add(len(self.state))


class HelperCounter(Writes):
    make = staticmethod(Helper)

    def count(self) -> None:
        self.state.calls += 1


class HelperList(Writes):
    make = staticmethod(Helper)

    def count(self) -> None:
        self.state.seen.append(1)


class HelperInHelper(Writes):
    make = staticmethod(Helper)

    def count(self) -> None:
        self.state.inner.calls += 1


class HelperInList(Writes):
    def make(self) -> Any:
        return [Helper()]

    def count(self) -> None:
        self.state[0].calls += 1


class SlottedCounter(Writes):
    make = staticmethod(Slotted)

    def count(self) -> None:
        self.state.calls += 1


class Nested(Writes):
    def make(self) -> Any:
        return {"train": {"calls": 0}, "shapes": [[]]}

    def count(self) -> None:
        self.state["train"]["calls"] += 1
        self.state["shapes"][0].append(1)


class Deque(GrowingList):
    make = staticmethod(collections.deque)


class Tally(Writes):
    make = staticmethod(collections.Counter)

    def count(self) -> None:
        self.state["calls"] += 1


class Default(Writes):
    def make(self) -> Any:
        return collections.defaultdict(int)

    def count(self) -> None:
        self.state["calls"] += 1


class Ordered(GrowingDict):
    make = staticmethod(collections.OrderedDict)


class Array(Writes):
    def make(self) -> Any:
        return np.zeros(2)

    def count(self) -> None:
        self.state[0] += 1


class PlainTensor(Writes):
    """A tensor that is no buffer."""

    def make(self) -> Any:
        return torch.zeros(2)

    def count(self) -> None:
        self.state += 1


class PlainTensorInList(Writes):
    def make(self) -> Any:
        return [torch.zeros(2)]

    def count(self) -> None:
        self.state[0].add_(1)


class PlainTensorData(Writes):
    """`.data` writes past the version counter."""

    def make(self) -> Any:
        return torch.zeros(2)

    def count(self) -> None:
        self.state.data.add_(1)


class PythonGenerator(Writes):
    def make(self) -> Any:
        return random.Random(0)

    def count(self) -> None:
        self.state.random()


class NumpyGenerator(Writes):
    def make(self) -> Any:
        return np.random.default_rng(0)

    def count(self) -> None:
        self.state.random()


class TorchGenerator(Writes):
    def make(self) -> Any:
        return torch.Generator().manual_seed(0)

    def count(self) -> None:
        torch.rand(1, generator=self.state)


def plain(value: Any) -> Any:
    """A state as something that compares by value."""
    if isinstance(value, (Helper, types.SimpleNamespace)):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Slotted):
        return value.calls
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, collections.deque)):
        return [plain(item) for item in value]
    return value


STATES = [
    Counter,
    GrowingList,
    GrowingDict,
    GrowingSet,
    HelperCounter,
    HelperList,
    HelperInHelper,
    HelperInList,
    SlottedCounter,
    Nested,
    Deque,
    Tally,
    Default,
    Ordered,
    Array,
    PlainTensor,
    PlainTensorInList,
    PlainTensorData,
    PythonGenerator,
    NumpyGenerator,
    TorchGenerator,
]


@pytest.mark.parametrize("model", STATES)
def test_naive_trace_writes_once(model: type[Writes]) -> None:
    base = fresh(model())
    before, called = copy.deepcopy(base), copy.deepcopy(base)
    graph = fx.symbolic_trace(base)
    assert plain(base.state) != plain(before.state), "naive: the trace counts as a call"
    graph(X), graph(X), called(X), called(X)
    assert plain(base.state) != plain(called.state), "naive: the calls do not count"


@pytest.mark.parametrize("model", STATES)
def test_state_is_as_it_was_and_counts_calls(model: type[Writes]) -> None:
    adapted, base = adapt(model())
    assert plain(adapted.state) == plain(base.state), "transform changed the model"
    assert_equals_oracle(adapted, base, X)
    assert plain(adapted.state) == plain(base.state), "calls do not write what the base model writes"
    assert hra_fx.report(adapted).rows[0].region == "alone"


@pytest.mark.parametrize("model", [Counter, GrowingList, HelperCounter, HelperList, PlainTensor])
def test_the_report_names_what_is_written(model: type[Writes]) -> None:
    adapted, _ = adapt(model())
    assert_refused(adapted, "outside of the graph")


class Cache(Two):
    """Keeps a value of one call for the next, as position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if "gain" not in self.table:
            self.table["gain"] = hidden.new_full((8,), 2.0)
        return self.second(hidden * self.table["gain"])


class LastValue(Two):
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden, self.last = hidden if self.last is None else hidden + self.last.detach(), hidden
        return self.second(hidden)


@pytest.mark.parametrize("model", [Cache, LastValue])
def test_naive_trace_leaves_a_proxy_in_the_model(model: type[nn.Module]) -> None:
    base = fresh(model())
    fx.symbolic_trace(base)
    kept = [*base.__dict__.get("table", {}).values(), base.__dict__.get("last")]
    assert any(type(value) is fx.Proxy for value in kept)


@pytest.mark.parametrize("model", [Cache, LastValue])
def test_caches_refuse_the_region_and_hold_no_proxy(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "outside of the graph")
    assert not adapted.__dict__.get("table") and adapted.__dict__.get("last") is None
    assert_equals_oracle(adapted, base, X)
