"""Where a graph of one call could differ from the model without an error: it does the same, or says that it cannot."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_modules import COPIES, X, config
from layers.checking import assert_same, gradients, randomise, vectors_of
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from tracing.captured import bert, tokens
from tracing.models import Branches, Creates, Two

import hra_fx
from hra_fx.errors import AdapterError


def traced(model: nn.Module, *example: Any, targets: tuple[str, ...] = ("first", "second")) -> tuple[Any, Any]:
    """The graph and the eager model, with the same vectors."""
    torch.manual_seed(0)
    eager = hra_fx.transform(copy.deepcopy(model), config(*targets, init_weights=False))
    graph = hra_fx.transform(model, config(*targets, init_weights=False), trace=True, example_inputs=example)
    graph.load_state_dict(eager.state_dict())
    return graph, eager


class Attention(Branches):
    """Dropout of an attention is another operator in train mode; the model has a parameter and a buffer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.mix, self.drop = nn.MultiheadAttention(6, 2, dropout=0.3), nn.Dropout(0.5)
        self.shift = nn.Parameter(torch.ones(6))
        self.register_buffer("scale", torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        hidden: Any = self.first(x if x.shape[0] < 100 else x[:100]) * self.scale + self.shift
        return self.second(self.drop(self.mix(hidden, hidden, hidden)[0]))


def test_two_graphs_have_the_mode_the_dtype_and_the_tensors_of_the_model() -> None:
    graph, eager = traced(Attention(), X.float())
    assert graph.training and "graph_of_mode" in graph._modules
    for model in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(model.eval()(X.float()), eager.eval()(X.float()))
        model.double()
        torch.testing.assert_close(model(X), copy.deepcopy(eager).double()(X))
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        other = copy.deepcopy(eager).double()
        other.load_state_dict(state)
        torch.testing.assert_close(model(X), other(X))


def test_parts_of_a_graph_have_modes_of_their_own() -> None:
    graph = hra_fx.transform(bert().train(), config("query"), trace=True, example_inputs=tokens(2, 5))
    assert graph.training and graph.by_mode_0.training
    graph.bert.eval(), graph.dropout.eval()
    for model in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        runs = [model(**tokens_of(seed)).logits for seed in (1, 2)]
        assert torch.equal(*runs)  # no dropout is left
        model.bert.train()
        runs = [model(**tokens_of(seed)).logits for seed in (1, 2)]
        assert not torch.equal(*runs)


def tokens_of(seed: int) -> dict[str, Any]:
    torch.manual_seed(0)
    inputs = tokens(3, 6)
    torch.manual_seed(seed)
    return inputs


class One(Branches):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        return self.second(hidden * 100 if hidden.shape[0] == 1 else hidden)


class Masked(Branches):
    def forward(self, x: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        mask = mask[:, :, None] if mask.dim() == 2 else mask
        x = x if x.shape[0] < 100 else x[:100]
        return self.second(self.first(x)) + (mask.sum() if mask.dtype is torch.bool else mask.mean())


@pytest.mark.parametrize(
    ("make", "example", "call", "condition"),
    [
        (One, (X,), (X[:1],), r"x\.size\(\)\[0\] != 1"),
        (Masked, (X, X), (X, X[None]), r"mask\.dim\(\) == 2"),
        (Masked, (X, X), (X, X > 0), r"mask\.dtype\.is_floating_point == True"),
    ],
)
def test_inputs_that_take_another_branch_are_refused(
    make: type[nn.Module], example: Any, call: Any, condition: str
) -> None:
    graph, _ = traced(make().double(), *example)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(AssertionError, match=condition):
        graph(*call)


def test_a_tensor_that_a_forward_creates_is_not_a_buffer() -> None:
    base = Creates().double()
    graph = hra_fx.transform(copy.deepcopy(base), config(r=2), trace=True, example_inputs=X, dynamic_shapes=({},))
    stored = pickle.dumps(graph)
    for model in (graph, copy.deepcopy(graph), pickle.loads(stored), copy.deepcopy(pickle.loads(stored))):
        assert not list(model.named_buffers())
        torch.testing.assert_close(model(X), base(X), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.float()(X.float()), copy.deepcopy(base).float()(X.float()))
        assert list(hra_fx.fold(model).state_dict()) == list(base.state_dict())


class Counts(Branches):
    calls = 0

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        self.calls += 1
        return self.second(self.first(x if x.shape[0] < 100 else x[:100]))


class Named(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.check_inputs = nn.Linear(6, 6)


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        (Counts, (X,), "its forward changes calls, which a graph drops"),
        (Named, (X,), "its attribute 'check_inputs' has a name that a graph uses"),
        (Branches, (X, X, X), "the example does not fit its forward"),
    ],
)
def test_what_a_graph_cannot_do_is_refused(make: Callable[[], nn.Module], example: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(make().double(), config(), trace=True, example_inputs=example)


class InPlace(Branches):
    def forward(self, *given: Any) -> Any:  # type: ignore[override]
        x, factor = given
        hidden = self.first(x if x.shape[0] < 100 else x[:100])
        hidden += 1
        hidden[:, 0] = 0
        return self.second(F.relu_(hidden)) * factor


def test_writes_into_the_output_of_a_layer_and_variadic_arguments() -> None:
    graph, eager = traced(InPlace().double(), X, 3)
    torch.testing.assert_close(graph(X[:3], 3), eager(X[:3], 3), rtol=1e-12, atol=1e-12)


def test_captures_in_several_threads() -> None:
    before = torch.Tensor.contiguous
    graphs: list[Any] = []
    threads = [threading.Thread(target=lambda: graphs.append(traced(One().double(), X))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.Tensor.contiguous is before
    assert len(graphs) == 3
    for graph, eager in graphs:
        torch.testing.assert_close(graph(X), eager(X), rtol=1e-12, atol=1e-12)


class Blocks(Two):
    def middle(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            scale = hidden.abs().mean()
            with torch.autocast("cpu", torch.bfloat16):
                scale = scale * (hidden.float() @ hidden.float().T).double().mean()
        return hidden * torch.sigmoid(scale)


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "pickle", "save"])
def test_copies_of_a_graph_keep_the_context_of_its_blocks(copied: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    base = Blocks().double()
    eager = hra_fx.transform(copy.deepcopy(base), config())
    randomise(eager)
    graph = hra_fx.transform(base, config(), trace=True, example_inputs=X, dynamic_shapes=({0: Dim.AUTO},))
    graph.load_state_dict(eager.state_dict())
    found, wanted = copied(graph), eager(X)
    output = found(X)
    assert_same(output, wanted)
    leaves = [list(vectors_of(model).values()) for model in (found, eager)]
    for one, other in zip(gradients(output, leaves[0]), gradients(wanted, leaves[1]), strict=True):
        assert_same(one, other, rtol=1e-8)
