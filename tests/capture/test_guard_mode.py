"""Guard: a graph knows one mode. A naive trace stays in the mode it was made in; here, each mode has its graph."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from capture.checks import (
    adapt,
    assert_equals_oracle,
    assert_refused,
    assert_whole,
    differ,
    fresh,
    inputs,
    naive,
    seed,
    spied,
)
from capture.models import Two
from torch import Tensor, fx, nn

import hra_fx


class Dropout(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x), 0.5, self.training))


class DropPath(Two):
    """Stochastic depth as timm has it: a mask for each sample, in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.training:
            hidden = hidden * hidden.new_empty((hidden.shape[0], 1)).bernoulli_(0.5).div_(0.5)
        return self.second(hidden)


class Norm(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: a subclass from outside of torch, which fx dissolves."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return torch.relu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps))


class BatchNorm(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


class TwoModes(Two):
    """Other code and another site in eval mode, as detection models and re-parametrised ones have."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden) if self.training else torch.sigmoid(self.other(hidden))


class TwoOutputs(Two):
    """Another structure of outputs in eval mode."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return self.second(hidden) if self.training else (self.second(hidden), hidden)


class InConstants(Two):
    """Each mode has constants of its own: by place, by keyword, in a tuple; a number beside one of another type."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.first(x), 0.25, self.training)
        hidden = F.dropout(hidden, p=0.5 if self.training else 0, training=self.training)
        hidden = hidden.reshape((-1, 2, 4) if self.training else (-1, 4, 2)).flatten(1)
        return self.second(torch.add(hidden, 1 if self.training else 1.0))


MODELS = (Dropout, InConstants, DropPath, BatchNorm, TwoModes, TwoOutputs)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("traced", [True, False], ids=["traced in train", "traced in eval"])
def test_naive_trace_runs_in_the_wrong_mode(model: type[nn.Module], traced: bool) -> None:
    base = fresh(model()).train(traced)
    graph = naive(base).train(not traced)
    base.train(not traced)
    x = inputs(16, 6)
    seed()
    found = graph(x)
    seed()
    expected = base(x)
    assert isinstance(found, tuple) != isinstance(expected, tuple) or differ(found, expected)


@pytest.mark.parametrize("model", MODELS)
def test_each_mode_has_its_graph(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_whole(adapted)
    spy = spied(adapted, inputs(16, 6))
    assert_equals_oracle(adapted, base, inputs(16, 6), modes=(True, False, True, False))
    assert spy.runs == 4
    train, evaluation = (hra_fx.graphs(adapted.train(mode))[""] for mode in (True, False))
    assert train.training and not evaluation.training
    assert train.code != evaluation.code


def test_one_graph_serves_both_modes_where_they_are_the_same() -> None:
    adapted, base = adapt(Two())
    assert_whole(adapted)
    region = adapted._hra_region
    assert region.graphs[True] is region.graphs[False]
    assert_equals_oracle(adapted, base, inputs(4, 6))


def test_the_counter_of_batch_norm_is_a_node_and_no_act_of_the_trace() -> None:
    base = fresh(BatchNorm()).train()
    graph = fx.symbolic_trace(base)
    graph(inputs(16, 6)), graph(inputs(16, 6))
    assert int(base.norm.num_batches_tracked) == 1, "naive: counted by the trace, and not by the two calls"
    adapted, base = adapt(BatchNorm())
    assert int(adapted.norm.num_batches_tracked) == 0
    spy = spied(adapted, inputs(16, 6))
    assert_equals_oracle(adapted, base, inputs(16, 6), modes=(True, True, False, True))
    assert int(adapted.norm.num_batches_tracked) == 3 and spy.runs == 4


class RandomDepth(Two):
    """Python's own dice decide, in train mode, whether a layer runs."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.training and random.random() < 0.5:
            hidden = hidden * 2
        return self.second(hidden)


def test_dice_thrown_in_one_mode_only_refuse_the_region() -> None:
    adapted, base = adapt(RandomDepth())
    assert hra_fx.report(adapted).rows[0].region == "alone"
    for value in range(6):
        assert_equals_oracle(adapted, base, inputs(3, 6, value=value), modes=(True, False))


def test_modes_that_differ_in_constants_share_a_graph_until_both_are_wanted() -> None:
    adapted, base = adapt(InConstants())
    assert_whole(adapted)
    region = adapted._hra_region
    assert len(region.drafts()) == 1
    for copied in (adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert_equals_oracle(copied, base, inputs(16, 6), modes=(True, False, True))
    train, evaluation = (hra_fx.graphs(adapted.train(mode))[""] for mode in (True, False))
    assert "training = True" in train.code and "training = False" in evaluation.code
    assert all("hra_in_eval" not in node.meta for graph in (train, evaluation) for node in graph.graph.nodes)
    assert region.graphs[True] is not region.graphs[False] and len(region.drafts()) == 2
    assert_equals_oracle(adapted, base, inputs(16, 6), modes=(False,))


class Answering(Two):
    """Takes a constant from a list that no trace sees, in the order of the calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x), 0.0, training=next(ANSWERS)))


ANSWERS = iter([True])


@pytest.mark.parametrize("answers", ["0101", "0111", "1000", "1011"])
def test_a_constant_that_changes_by_itself_is_not_taken_for_one_of_the_mode(
    monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    monkeypatch.setitem(globals(), "ANSWERS", (answer == "1" for answer in answers))
    adapted, _ = adapt(Answering())
    assert_refused(adapted, "two traces of it differ")
