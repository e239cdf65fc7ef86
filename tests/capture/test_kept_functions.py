"""A function that cannot be traced through stays a call in the graph, if it is certain to give values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from capture import functions
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
from capture.functions import chained, even_rows, even_rows as renamed
from capture.models import Two
from torch import Tensor, nn

import hra_fx

SIZES = (2, 3, 4, 7)


class Even(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = even_rows(self.first(x))
        return self.second(hidden[: x.shape[0]])


class Renamed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(renamed(self.first(x)))


class OfModule(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(functions.even_rows(self.first(x)))


class Chained(Two):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(chained(self.first(x), bias=self.bias) + chained(self.first(x), (3,)))


class Both(Two):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        hidden, count = functions.two(self.first(x))
        return self.second(hidden) / count, count


class NoGradient(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden + functions.without_gradient(hidden))


class Listed(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(functions.rows_of([hidden.shape[0], 8], hidden))


class Numbered(Two):
    """In train mode alone, and with dropout after it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.training:
            hidden = torch.nn.functional.dropout(functions.numbered(hidden), 0.4)
        return self.second(hidden)


KEPT = (Even, Renamed, OfModule, Chained, Both, NoGradient, Listed, Numbered)


@pytest.mark.parametrize("model", KEPT)
def test_a_function_that_branches_is_one_node_and_right_on_either_side(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    spy = spied(adapted, inputs(4, 6))
    for rows in SIZES:
        assert_equals_oracle(adapted, base, inputs(rows, 6))
    assert spy.runs == 3 * len(SIZES)
    nodes = hra_fx.graphs(adapted.train())[""].graph.nodes
    kept = {node.target for node in nodes if getattr(node.target, "__module__", "") == functions.__name__}
    assert len(kept) == 1


@pytest.mark.parametrize("model", [Even, Renamed, OfModule, Chained, Both, Listed, Numbered])
def test_fx_alone_cannot_trace_them(model: type[nn.Module]) -> None:
    with pytest.raises(Exception, match=r"control flow|Proxy|cannot be iterated|integer"):
        naive(model().train())


def test_fx_alone_drops_the_context() -> None:
    base = fresh(NoGradient()).eval()
    x = inputs(4, 6).requires_grad_()
    found, expected = (torch.autograd.grad(run(x).sum(), x)[0] for run in (naive(base), base))
    assert differ(found, expected)


def test_the_functions_are_what_they_were_after_a_trace() -> None:
    before = dict(vars(functions)), even_rows, globals()["chained"]
    for model in (*KEPT, *(model for model, _ in REFUSED)):
        adapt(model())
    assert {name: vars(functions)[name] for name in before[0]} == before[0]
    assert globals()["even_rows"] is before[1] and globals()["chained"] is before[2]


def test_copies_and_pickles_keep_the_call() -> None:
    adapted, base = adapt(Even())
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        spy = spied(twin, inputs(4, 6))
        assert_equals_oracle(twin, base, inputs(5, 6))
        assert spy.runs == 3


class AsksPerhaps(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.perhaps(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksFallsOff(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.falls_off(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksNamedNone(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.named_none(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksAnother(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_from_another(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksList(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_from_a_list(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksAppended(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_from_an_appended_list(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksProduct(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_from_a_product(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksDefault(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_by_default(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksGivenNone(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_by_default(hidden, other=None)
        return self.second(hidden if found is None else hidden * 2)


class AsksKeywords(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_by_keywords(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksPair(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_in_default(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksDict(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.none_from_a_dict(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksSwallowed(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.swallowed(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksCaught(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.caught(hidden)
        return self.second(hidden if found is None else hidden * 2)


class AsksAttribute(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.of_attribute(hidden.detach())
        return self.second(hidden if found is None else hidden * 2)


class AsksWrapped(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        found = functions.wrapped(hidden)
        return self.second(hidden if found is None else hidden * 2)


class Fills(Two):
    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        hidden = functions.fill(found, self.first(x))
        return self.second(sum(found, hidden))  # type: ignore[arg-type]


class Writes(Two):
    def forward(self, x: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        hidden = functions.write(found, self.first(x))
        return self.second(found.get("more", hidden))


class Aliases(Two):
    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        hidden = functions.alias(found, found[0])
        return self.second(found[0] + hidden)


class Applies(Two):
    def forward(self, x: Tensor) -> Tensor:
        return functions.apply(self.second, self.first(x))


class Method(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.turned(self.first(x)))

    def turned(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 3 else x


class Nested(Two):
    def forward(self, x: Tensor) -> Tensor:
        def turned(value: Tensor) -> Tensor:
            return value * 2 if value.shape[0] > 3 else value

        return self.second(turned(self.first(x)))


BRANCHES = "it branches on a value"
REFUSED: list[tuple[type[nn.Module], str]] = [
    *((model, BRANCHES) for model in (AsksPerhaps, AsksFallsOff, AsksNamedNone, AsksAnother, AsksList, AsksAppended)),
    *((model, BRANCHES) for model in (AsksKeywords, AsksPair)),
    (AsksDict, "it looks a value up in a set or dictionary"),
    *((model, BRANCHES) for model in (AsksProduct, AsksDefault, AsksGivenNone, AsksSwallowed, AsksCaught)),
    *((model, BRANCHES) for model in (AsksAttribute, AsksWrapped, Fills, Writes, Aliases, Applies, Method, Nested)),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[model.__name__ for model, _ in REFUSED])
def test_one_that_may_give_none_or_changes_what_it_is_given_refuses_the_region(
    model: type[nn.Module], reason: str
) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, reason)
    for rows in SIZES:
        assert_equals_oracle(adapted, base, inputs(rows, 6))
