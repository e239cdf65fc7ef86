"""Guard: what a forward writes. Under a naive trace it is written once, at trace time, often with a proxy, and never again."""

from __future__ import annotations

import collections
import copy
import random
import types
from typing import Any, ClassVar

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
    spied,
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


SHARED: dict[str, Tensor] = {}


class ModuleCache(Two):
    """The cache is a global of the model's file."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if "gain" not in SHARED:
            SHARED["gain"] = hidden.new_full((8,), 2.0)
        return self.second(hidden * SHARED["gain"])


class ClassCache(Two):
    """The cache belongs to the class."""

    table: ClassVar[dict[str, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if "gain" not in self.table:
            self.table["gain"] = hidden.new_full((8,), 2.0)
        return self.second(hidden * self.table["gain"])


def test_a_cache_of_the_class_holds_no_proxy() -> None:
    ClassCache.table.clear()
    adapted, base = adapt(ClassCache())
    assert not ClassCache.table
    assert_equals_oracle(adapted, base, X)
    ClassCache.table.clear()


def test_a_cache_that_the_process_filled_before_is_read_by_value() -> None:
    """Where the model ran once, its global cache is filled with tensors, and no trace writes it."""
    SHARED.clear()
    fresh(ModuleCache())(X)
    adapted, base = adapt(ModuleCache())
    assert_equals_oracle(adapted, base, X)
    assert not isinstance(SHARED["gain"], fx.Proxy)
    SHARED.clear()


def test_an_empty_global_cache_raises_nothing_out_of_transform() -> None:
    SHARED.clear()
    adapted, base = adapt(ModuleCache())
    SHARED.clear()
    assert_equals_oracle(adapted, base, X)
    SHARED.clear()


CALLS = [0]


class GlobalCounter(Two):
    """Traces differ, and that is all that can be seen."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] += 1
        return self.second(self.first(x) * CALLS[0])


class GlobalToggle(Two):
    """Every second trace agrees."""

    def forward(self, x: Tensor) -> Tensor:
        CALLS[0] = 1 - CALLS[0]
        return self.second(self.first(x) * (1 + CALLS[0]))


@pytest.mark.parametrize("model", [GlobalCounter, GlobalToggle])
def test_a_global_counter_makes_two_traces_differ(model: type[nn.Module]) -> None:
    CALLS[0] = 0
    graph = naive(fresh(model()))
    assert not differ(graph(X), graph(X)), "naive: the count of the trace, for ever"
    CALLS[0] = 0
    adapted, base = adapt(model())
    assert_refused(adapted, "two traces of it differ")
    for _ in range(3):
        assert_equals_oracle_once(adapted, base)


def assert_equals_oracle_once(adapted: nn.Module, base: nn.Module) -> None:
    before = CALLS[0]
    found = adapted(X)
    CALLS[0] = before
    expected = oracle(adapted, base)(X)
    assert_close(found.detach(), expected.detach())


class Buffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.write(hidden)
        return self.second(hidden - self.mean)

    def write(self, hidden: Tensor) -> None:
        self.count.add_(1)
        self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))


class BufferCopy(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.mean.copy_(hidden.detach().mean(0))
        self.count.data.add_(1)


class BufferOperator(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.count += 1
        self.mean[:4] = hidden.detach().mean(0)[:4]


class BufferRebound(Buffer):
    def write(self, hidden: Tensor) -> None:
        self.count = self.count + 1
        self.mean = 0.5 * self.mean + 0.5 * hidden.detach().mean(0)


class BufferInTraining(Buffer):
    def write(self, hidden: Tensor) -> None:
        if self.training:
            self.count.add_(1)
            self.mean.lerp_(hidden.detach().mean(0), 0.25)


@pytest.mark.parametrize("model", [Buffer, BufferCopy, BufferOperator, BufferRebound, BufferInTraining])
def test_buffers_are_written_by_calls_and_never_by_a_trace(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert int(adapted.count) == 0 and not adapted.mean.any()
    assert_equals_oracle(adapted, base, X, modes=(True, True, False, True))
    assert int(adapted.count) == (3 if model is BufferInTraining else 4)


@pytest.mark.parametrize("model", [Buffer, BufferCopy, BufferInTraining])
def test_in_place_updates_of_buffers_are_nodes(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert hra_fx.report(adapted).rows[0].region == "whole"
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3


def test_naive_trace_updates_a_buffer_once() -> None:
    base = fresh(Buffer())
    graph = fx.symbolic_trace(base)
    count = int(base.count)
    graph(X), graph(X)
    assert count == 1 and int(base.count) == 1


class Constant(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.arange(8.0, dtype=torch.float64))


class ConstantOfModule(Two):
    """A tensor attribute that is no buffer; the trace gives it no new name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(8.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.table)


def test_a_tensor_made_in_forward_refuses_the_region_and_is_not_left_behind() -> None:
    base = fresh(Constant())
    fx.symbolic_trace(base)
    assert "_tensor_constant0" in vars(base), "naive: it is left in the real model"
    adapted, base = adapt(Constant())
    assert_refused(adapted, "its forward changes or makes _tensor_constant0")
    assert "_tensor_constant0" not in vars(adapted)
    assert_equals_oracle(adapted, base, X)


def test_a_tensor_attribute_is_read_at_each_call() -> None:
    adapted, base = adapt(ConstantOfModule())
    assert_equals_oracle(adapted, base, X)
    for subject in (adapted, base):
        subject.table = torch.full((8,), -3.0, dtype=torch.float64)
    assert_equals_oracle(adapted, base, X)
    for subject in (adapted, base):
        subject.table.mul_(2)
    assert_equals_oracle(adapted, base, X)


class Toggles(Two):
    """Puts itself into another mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.second.eval()
        return self.second(self.first(x))


def test_a_forward_that_changes_modes_refuses_the_region() -> None:
    adapted, base = adapt(Toggles())
    assert_refused(adapted, "its forward changes or makes second.training")
    assert adapted.second.training and base.second.training
    assert_equals_oracle(adapted, base, X)
