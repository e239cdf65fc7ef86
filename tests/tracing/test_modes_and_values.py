"""Graphs of models that run other operations in train mode, and of models that branch on values of tensors."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
import transformers
from layers.checking import assert_same, normal, tensors
from torch import Tensor, fx, nn
from tracing.models import Two
from zoo.models import entries

import hra_fx
from hra_fx.errors import AdapterError
from hra_fx.model.graph_module import GraphOfMode, graph_in_eval

pytestmark = pytest.mark.needs("torch>=2.9")

X = normal(1, 4, 6)
LAYERS = hra_fx.HRAConfig(r=2, target_modules="all-linear")


def captured(model: nn.Module, example: Any) -> Any:
    return hra_fx.transform(copy.deepcopy(model), LAYERS, trace=True, example_inputs=example)


class Drawn(nn.Module):
    """A random program: each step runs in train mode, in eval mode, or in both, on what its mode has computed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.counts = nn.Buffer(torch.zeros(6))
        self.steps = [
            (draw.choice((None, None, True, False)), draw.randrange(5), draw.randrange(99), draw.randrange(99))
            for _ in range(9)
        ]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = [(x * 2 if x.shape[0] > 2 else x) + self.counts]  # a branch, so torch.export captures it
        for mode, kind, *places in self.steps:
            if mode in (None, self.training):
                one, other = (values[place % len(values)] for place in places)
                values.append(self.step(kind, one, other))
        return {"last": self.layers[0](values[-1]), "sum": values[len(values) // 2] + values[len(values) // 3]}

    def step(self, kind: int, one: Tensor, other: Tensor) -> Tensor:
        if kind == 0:
            return torch.tanh(self.layers[0](one) - other)
        if kind == 1:
            return self.layers[1](one) + torch.rand_like(other)
        if kind == 2:
            self.counts += one.detach().mean(0)
            return one * self.layers[2].weight[0]
        return (one + 1).contiguous() if kind == 3 else one / (2 + other.abs())


@pytest.mark.parametrize("seed", range(16))
def test_random_programs_with_other_steps_in_each_mode(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hra_fx.HRAWarning)  # of layers that only one mode calls
        graph = captured(model, X)
    for made in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        for training in (True, False, True):
            for module in (model, made):
                module.counts.zero_()
            wanted, found = (ran(module.train(training)) for module in (model, made))
            assert_same(found, wanted)
    plain = fx.GraphModule(graph, graph_in_eval(graph)).eval()
    for module in (model.eval(), plain):
        module.counts.zero_()
    assert_same(ran(plain), ran(model))
    assert not any(isinstance(part, GraphOfMode) for part in plain.modules())


def ran(module: nn.Module) -> list[Tensor]:
    """The outputs, the gradient of the input, and what the call leaves in the buffer."""
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    output = module(x)
    (gradient,) = torch.autograd.grad(output["last"].sum() + output["sum"].square().sum(), x)
    return [output["last"], output["sum"], gradient, module.counts.clone()]


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


class Parts(Two):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.ModuleDict({"noisy": Noisy()})

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x * 2 if x.shape[0] > 2 else x)
        return self.second(self.part["noisy"](hidden) * hidden)


def test_a_difference_follows_the_mode_of_its_module() -> None:
    graph = captured(Parts().double(), X).train()
    assert not torch.equal(graph(X), graph(X))
    graph.part.eval()
    assert torch.equal(graph(X), graph(X))
    graph.eval().part.train()
    assert not torch.equal(graph(X), graph(X))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL"])
def test_models_of_diffusers_are_graphs_of_all_their_layers(name: str) -> None:
    entry = entries()[f"diffusers/{name}"]
    torch.manual_seed(0)
    model = entry.build()
    args, kwargs = entry.call(2, 0)
    call = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    graph = captured(model, call)
    layers = {path for path, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    assert layers <= {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    parts = [part for part in graph.children() if isinstance(part, GraphOfMode)]
    inside = [node.target for part in parts for node in part.in_train.graph.nodes if node.op.startswith("call")]
    assert set(inside) == {torch.ops.aten.contiguous.default}
    assert not any("graph_of_mode" in key for key in hra_fx.to_networkx(graph))
    for training in (True, False):
        wanted, found = (tensors(seeded(module.train(training), call)) for module in (model, graph))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def seeded(module: nn.Module, call: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return module(**call)


# --- values -----------------------------------------------------------------------------------------------------------


class Guarded(Two):
    """It clamps what is too large, as DETR does, and has a buffer that each call in train mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        if (hidden.abs() > 100).any():
            hidden = hidden.clamp(-1, 1)
        return hidden


def test_a_branch_on_values_is_checked() -> None:
    model = Guarded().double()
    before = copy.deepcopy(model.state_dict())
    graph = captured(model, X)
    for name, value in before.items():
        assert torch.equal(graph.state_dict()[name], value), name
    for training in (True, False):
        assert_same(graph.train(training)(X[:3]), model.train(training)(X[:3]))
    for module in (graph, pickle.loads(pickle.dumps(graph))):
        with pytest.raises(RuntimeError, match=r"whose values take another way.*middle.*Call the original model"):
            module.eval()(X * 1e6)


class AtLeastTwo(Two):
    """It checks a number of rows that depends on values."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        found = self.first(x)[mask]
        return self.second(found.mean(0) if found.shape[0] < 2 else found.sum(0))


def test_a_count_on_the_other_side_of_a_branch_is_refused() -> None:
    model = AtLeastTwo().double()
    mask = torch.tensor([True, True, False, True, True, False])
    x = normal(2, 6, 6)
    graph = captured(model, (x, mask))
    assert_same(graph(x, mask), model(x, mask))
    with pytest.raises(RuntimeError, match=r"whose values take another way"):
        graph(x, torch.arange(6) == 3)


class Gated(Two):
    """It branches on a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(()))

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden.sin() if self.gate > 0 else hidden.cos()


def test_a_branch_on_a_parameter_sees_its_value() -> None:
    model = Gated().double()
    graph = captured(model, X)
    assert_same(graph(X), model(X))
    with torch.no_grad():
        graph.gate.fill_(-1.0)
    with pytest.raises(RuntimeError, match=r"whose values take another way"):
        graph(X)


class Places(Two):
    """It reads from places that depend on values, and branches on one."""

    def forward(self, x: Tensor, marks: Tensor) -> Any:
        hidden = self.first(x)
        rows, columns = torch.where(marks == 1)
        hidden = hidden.sum() + hidden[rows, columns] * (2 if x.sum() > 0 else 3)
        return self.second(hidden)


def test_places_that_depend_on_values() -> None:
    model = Places().double()
    x, marks = normal(1, 5, 5, 6).abs(), torch.eye(5, dtype=torch.long)
    graph = captured(model, (x, marks))
    for other in (marks, marks.flip(0), marks.roll(1, 0)):
        assert_same(graph(x.flip(0), other), model(x.flip(0), other))
    with pytest.raises(RuntimeError, match=r"whose values take another way.*x\.sum\(\) > 0"):
        graph(-x, marks)
    with pytest.raises(RuntimeError, match=r"whose values take another way.*torch\.where"):  # another number of places
        graph(x, marks.tril(-1))


def classified(batch: int, length: int) -> dict[str, Tensor]:
    """Token ids, with one end token in each row, as BART's classifier requires."""
    ids = torch.randint(5, 20, (batch, length))
    ids[:, -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_classifier_that_counts_end_tokens() -> None:
    sizes = {"vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = transformers.BartForSequenceClassification(transformers.BartConfig(**sizes, **heads)).double().eval()
    graph = captured(model, classified(2, 7))
    for batch, length in ((2, 7), (3, 5)):
        call = classified(batch, length)
        assert_same(graph(**call).logits, model(**call).logits)
    with pytest.raises(RuntimeError, match=r"whose values take another way"):
        graph(**classified(1, 7))
    uneven = classified(2, 7)
    uneven["input_ids"][0, 3] = 2
    with pytest.raises(RuntimeError, match=r"modeling_bart\.py.*eos_mask"):
        graph(**uneven)


class Normalized(nn.Module):
    """Writes into a parameter that is too large to be copied for the comparison of most models."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(6, 520), nn.Parameter(torch.randn(520, 520))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.table.div_(self.table.norm())
        return self.first(x) @ self.table


def test_a_forward_that_writes_into_a_large_parameter_is_compared_on_copies() -> None:
    model = Normalized().double()
    before = model.table.clone()
    eager = hra_fx.transform(copy.deepcopy(model), LAYERS)
    graph = hra_fx.transform(model, LAYERS, trace=True, example_inputs=X)
    assert torch.equal(graph.table, before)
    graph.load_state_dict(eager.state_dict())
    assert_same(graph(X), eager(X))
    assert_same(graph.table, eager.table)


class Chosen(nn.Module):
    """It looks up a size or a dtype."""

    def __init__(self, by_size: bool) -> None:
        super().__init__()
        self.first, self.by_size = nn.Linear(6, 6), by_size

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.by_size:
            return hidden * 3 if x.shape[0] in {2, 4} else hidden
        return hidden * {torch.float64: 2.0}.get(x.dtype, 1.0)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_lookup_of_a_value_is_not_a_constant(by_size: bool) -> None:
    model = Chosen(by_size).double()
    with pytest.raises(AdapterError, match="looks up a value in a set or dictionary"):
        hra_fx.transform(copy.deepcopy(model), LAYERS, trace=True)
    if by_size:
        with pytest.raises(AdapterError, match="unhashable type"):
            captured(model, X)
    else:
        eager = hra_fx.transform(copy.deepcopy(model), LAYERS)
        assert_same(captured(model, X)(X), eager(X))
