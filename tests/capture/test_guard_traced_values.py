"""Guard: what a forward does with a value beside computing with it, which no node stands for."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from capture.checks import adapt, assert_equals_oracle, assert_refused, assert_whole, inputs
from capture.models import Two
from torch import Tensor, nn
from torch.nn import functional as F

X = inputs(4, 6)
KEPT: list[Tensor] = []
SEEDED = random.Random(3)


class Counter:
    def __init__(self) -> None:
        self.calls = 0
        self.losses: list[Tensor] = []


COUNTER = Counter()


class SetsData(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data = torch.clamp(self.scale.data, max=0.5)
        return self.second(self.first(x) * self.scale)


class SetsAttribute(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden.places = (1, 2)  # type: ignore[attr-defined]
        return self.second(hidden)


class AsksByText(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if str(hidden.dtype) == "torch.float64" else hidden)


class AsksByFormat(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if f"{hidden.device}" == "cpu" else hidden)


class WritesAndCatches(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            hidden[..., 0] = 0
        except TypeError:
            hidden = hidden * 5
        return self.second(hidden)


class CopiesInPython(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = copy.deepcopy(x)
        hidden += 1
        return self.second(self.first(hidden))


class KeepsInAGlobal(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        COUNTER.losses.append(hidden.mean())
        return self.second(hidden)


class Counts(Two):
    def forward(self, x: Tensor) -> Tensor:
        COUNTER.calls += 1
        return self.second(self.first(x))


class DrawsFromItsOwn(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if SEEDED.random() < 2 else hidden * 2)


class PacksWhatIsSaved(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return self.second(torch.tanh(self.first(x)))


def same_kind(x: Any) -> bool:
    return type(x) is Tensor


class AsksInAFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if same_kind(hidden) else hidden)


class Base(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if type(hidden) is Tensor else hidden)


class AsksInItsBase(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (SetsData, "it sets 'data' of a value"),
        (SetsAttribute, "it sets 'places' of a value"),
        (AsksByText, "it takes a value for text"),
        (AsksByFormat, "it takes a value for text"),
        (WritesAndCatches, "it writes into a part of a value"),
        (CopiesInPython, "it writes into a part of a value, copies one in Python"),
        (KeepsInAGlobal, "which is global"),
        (Counts, "which is global"),
        (DrawsFromItsOwn, "which is global"),
        (PacksWhatIsSaved, "it changes what is saved for backward"),
        (AsksInAFunction, "it asks for the type of a value (type), and a traced value has none (in same_kind)"),
        (AsksInItsBase, "it asks for the type of a value (type)"),
    ],
)
def test_what_no_node_stands_for_refuses_the_region(model: type[nn.Module], reason: str) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, reason)
    COUNTER.losses.clear()
    if model is not CopiesInPython:  # an input without gradient is a leaf, and may be copied
        assert_equals_oracle(adapted, base, X)
    else:
        assert_equals_oracle(adapted, base, X.detach())


def test_a_value_may_stand_in_the_words_of_an_error() -> None:
    class Speaks(Two):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[1] == 6, f"6 are due, and there are {x.shape[1]}")
            return self.second(self.first(x))

    adapted, base = adapt(Speaks())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)
    with pytest.raises(AssertionError):
        adapted(inputs(4, 5))


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return self.parts(x)

    def parts(self, x: Tensor) -> Any:
        return F.linear(x, self.weight), None


class Annotated(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        out: object = None
        return out


class Fills(nn.Linear):
    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(x)
        return F.linear(x, self.weight)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x, x, x, need_weights=False)


class CallsPair(Two):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Pair(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out, bias = self.odd(x)
        return self.second(self.first(out if bias is None else out * 2))


class CallsAnnotated(CallsPair):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Annotated(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x if self.odd(x) is None else x * 2))


class CallsFilling(CallsPair):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Fills(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        return self.second(self.first(self.odd(x, seen) * (2 if seen else 1)))


class CallsAttention(CallsPair):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Attention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.odd(x)
        return self.second(self.first(out * 2 if weights is None else out))


class CallsPlainAttention(CallsPair):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.odd(x, x, x, need_weights=False)
        return self.second(self.first(out * 2 if weights is None else out))


class CallsIdentity(CallsPair):
    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * 2 if self.odd(None) is None else x))


@pytest.mark.parametrize("model", [CallsPair, CallsAnnotated, CallsFilling, CallsAttention])
def test_a_leaf_that_may_give_no_tensor_refuses_the_region(model: type[nn.Module]) -> None:
    adapted, base = adapt(model(), ["first", "second"])
    assert_refused(adapted, "odd: ")
    assert_equals_oracle(adapted, base, X)


@pytest.mark.parametrize("model", [CallsPlainAttention, CallsIdentity])
def test_what_a_leaf_gives_for_nothing_is_known(model: type[nn.Module]) -> None:
    adapted, base = adapt(model(), ["first", "second"])
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)


class Settings:
    gain = 2.0


class ReadsAnObject(Two):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.settings.gain * getattr(self.settings, "more", 1.0))


def test_an_attribute_that_comes_to_an_object_is_seen() -> None:
    adapted, base = adapt(ReadsAnObject())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)
    for name, value in (("more", 3.0), ("gain", 5.0)):
        for part in (adapted, base):
            setattr(part.settings, name, value)
        assert_equals_oracle(adapted, base, X)


class ReadsAList(Two):
    def __init__(self) -> None:
        super().__init__()
        self.settings = [Settings()]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.settings[0].gain)


class ReadsATensor(Two):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.gain.item())


class ReadsALeaf(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return self.second(hidden * 2 if self.norm.eps > 1e-6 else hidden)


@pytest.mark.parametrize("model", [ReadsAList, ReadsATensor])
def test_what_may_change_unseen_refuses_the_region(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "which may change unseen")
    assert_equals_oracle(adapted, base, X)


def test_what_is_read_of_a_leaf_is_a_fact() -> None:
    adapted, base = adapt(ReadsALeaf(), ["first", "second"])
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)
    adapted.norm.eps = base.norm.eps = 1e-7
    assert_equals_oracle(adapted, base, X)
