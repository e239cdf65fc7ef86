"""What `verify=True` finds: reflections, gradients, buffers and graphs that are wrong on purpose."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from capture.checks import fresh
from torch import Tensor, nn
from verified import Two, X, refused, verified

import hra_fx
import hra_fx.api.transform
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapted_layer import LinearCarrier
from hra_fx.layers.variants import LinearReflection
from hra_fx.model.state import regions_of
from hra_fx.model.verify import check_against_folded


class Hidden(Two):
    """Reads a weight by a way that neither a source nor the attribute shows."""

    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(super().forward(x), self.first._parameters["weight"])


def test_a_weight_that_is_read_past_its_attribute_is_named_as_the_first_look_does() -> None:
    for model in (fresh(Hidden()), fresh(Hidden()).eval()):
        message = refused(model, X, UnsupportedLayerError)
        assert message.startswith("first: the model (Hidden, in linear) reads its weight past the attribute")
    verified(fresh(Hidden()), X, target_modules=["second"])


class TurnsAway(LinearReflection):
    """A reflection that is not quite one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.01


class Detached(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


class HalfTheGradient(LinearReflection):
    """Right in value."""

    def forward(self, input: Tensor) -> Tensor:
        right = super().forward(input)
        return (right + right.detach()) / 2


class InTrainMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.01 if self.training else 1.0)


class InEvalMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if self.training else 1.01)


class DetachedInput(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach())


class Crashing(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        raise ZeroDivisionError("by design")


def wrong(monkeypatch: pytest.MonkeyPatch, kind: type[LinearReflection], only: str = "") -> None:
    """Make `transform` take another reflection, for layers whose `tag` is `only`."""
    import hra_fx.model.inject as installing

    def make(layer: nn.Module, *, on_weight: bool = False) -> Any:
        reflection = ours(layer, on_weight=on_weight)
        if only in getattr(layer, "tag", ""):
            reflection.__class__ = kind
        return reflection

    ours = installing.reflection_for
    monkeypatch.setattr(installing, "reflection_for", make)


class Blocks(nn.Module):
    """Two regions in a model that is none, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(self.left(x)) if float(x.detach().sum()) < 1e9 else x
        return self.head(x)


@pytest.mark.parametrize(
    ("layer", "where"), [("left.2", "left"), ("right.0", "right"), ("right.2", "right"), ("head", "head")]
)
def test_the_first_region_or_layer_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: str, where: str
) -> None:
    model = fresh(Blocks())
    model.get_submodule(layer).tag = "this"
    wrong(monkeypatch, TurnsAway, "this")
    assert refused(model, X).startswith(f"{where}: in train mode output 0 of the rewritten model is not that")
    monkeypatch.undo()
    verified(model, X)


def test_gradients_that_are_missing_and_graphs_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(Blocks())
    model.left[2].tag = "this"
    wrong(monkeypatch, Detached, "this")
    message = refused(model, X)
    assert message.startswith("left.0: in train mode the gradient of its vectors 'default' is missing.")
    ids = fresh(nn.Sequential(nn.Embedding(7, 6), Blocks()))
    ids[1].left[2].tag = "this"
    message = refused(ids, torch.tensor([[1, 2, 3]]))
    assert message.startswith("1.left.0: in train mode the gradient of its vectors 'default' is missing.")
    monkeypatch.undo()
    wrong(monkeypatch, Crashing, "this")
    assert refused(model, X) == (
        "the model: in train mode the rewritten one does not run, and the folded one does (ZeroDivisionError: by "
        "design). The rewrite would be wrong, and was taken back. Please report the model."
    )


class Rounded(Two):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        if x.dtype is torch.float64:
            raise TypeError("no doubles")
        return super().forward(x)


class Single(Two):
    """Multiplies by a float32 tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = [torch.eye(6)]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x @ self.matrix[0])


@pytest.mark.parametrize("make", [Rounded, Single])
def test_a_model_that_does_not_run_in_float64_is_compared_in_float32(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    torch.manual_seed(0)
    verified(make(), X.float())

    model = make()
    wrong(monkeypatch, TurnsAway)
    assert "output 0 of the rewritten model is not that of the folded one" in refused(model, X.float())


class Keeps(Two):
    """Keeps in a buffer what a layer gives, and gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Any:
        self.seen[: len(x)].copy_(self.first(x).detach())
        return self.second(x)


def test_buffers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(Keeps())
    model.first.tag = "this"
    wrong(monkeypatch, TurnsAway, "this")
    message = refused(model, X)
    assert message.startswith("first: in train mode buffer seen of the rewritten model is not that of the folded one")


@dataclasses.dataclass
class Output:
    value: Tensor
    note: str = ""


class Structured(Two):
    def forward(self, x: Tensor) -> Any:
        return {"out": [Output(super().forward(x))], "label": "text", "count": 3}


class NoTensor(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(-1)


def test_outputs_in_structures_and_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    verified(fresh(Structured()), X)
    with monkeypatch.context() as patch:
        wrong(patch, TurnsAway)
        assert "in train mode output 0" in refused(fresh(Structured()), X)
    assert refused(fresh(NoTensor()), X) == (
        "example_inputs: in train mode NoTensor gives no floating-point tensor for them, so there is nothing to "
        "compare. Give inputs for which it does, or leave verify out."
    )


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_whatever_the_user_is_in(monkeypatch: pytest.MonkeyPatch, context: Any) -> None:
    model = fresh(Two())
    model.first.tag = "this"
    wrong(monkeypatch, HalfTheGradient, "this")
    with context():
        message = refused(model, X)
    assert message.startswith("first: in train mode the gradient of its vectors 'default' is wrong.")
    ids = fresh(nn.Sequential(nn.Embedding(7, 6), Two()))
    ids[1].first.tag = "this"
    assert refused(ids, torch.tensor([[1, 2, 3]])) == (
        "1.first: in train mode the gradient of its vectors 'default' is wrong. The rewrite would be wrong, and was "
        "taken back. Leave the layer out with exclude_modules, and please report the model."
    )


@pytest.mark.parametrize(("kind", "mode"), [(InTrainMode, "train"), (InEvalMode, "eval")])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, kind: type[LinearReflection], mode: str, training: bool
) -> None:
    wrong(monkeypatch, kind)
    assert f"in {mode} mode output 0 of the rewritten" in refused(fresh(Two()).train(training), X)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_that_is_not_its_forward(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """The graphs of the regions are what runs, and each of both."""

    def spoil(model: nn.Module, call: Any) -> None:
        graphs = regions_of(model)["right"]._hra_region.graphs
        graphs[training] = copy.deepcopy(graphs[training])
        output = graphs[training].find_nodes(op="output")[0]
        with graphs[training].inserting_before(output):
            output.args = (graphs[training].call_function(torch.mul, (output.args[0], 1.001)),)
        check_against_folded(model, call)

    monkeypatch.setattr(hra_fx.api.transform, "check_against_folded", spoil)
    mode = "train" if training else "eval"
    assert refused(fresh(Blocks()), X).startswith(f"right: in {mode} mode output 0 of the rewritten model is not that")


def test_gradients_of_the_inputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, DetachedInput)
    one = fresh(nn.Sequential(nn.Linear(6, 6)))
    assert refused(one, X).startswith("the model: in train mode gradient of input 0 of the rewritten model is not that")


def test_the_carrier_of_a_layer_goes_with_an_error() -> None:
    model = fresh(Hidden())
    refused(model, X, UnsupportedLayerError)
    assert not any(isinstance(part, LinearCarrier) for part in model.modules())
