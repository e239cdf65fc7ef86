"""`hra_fx.graphs(model, example_inputs)`: one graph that computes what the model does, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from adapting import adapted, randomise
from layers.checking import assert_same
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import hra_fx
from hra_fx.errors import AdapterError


class Branching(nn.Module):
    """fx cannot trace it, because it branches on a shape. It has every kind of adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        if x.shape[0] > 100:
            x = x[:100]
        rows = self.norm(self.conv(x)).flatten(2).mT
        read, _ = self.attention(rows, rows, rows, need_weights=False)
        return {"again": self.head(read), "rows": self.drop(self.head(scale * rows))}


def branching(**fields: Any) -> Any:
    torch.manual_seed(1)
    return adapted(Branching().double().eval(), "conv", "attention", "attention.out_proj", "head", **fields)


def image() -> Tensor:
    return torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(5)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def reflections_in(graph: fx.GraphModule) -> Counter[str]:
    """How many nodes reflect the input or the weight of each layer."""
    first = {part: path.removesuffix(".hra_u") for path, part in graph.named_modules() if path.endswith(".hra_u")}
    called = [graph.get_submodule(str(node.target)) for node in graph.graph.find_nodes(op="call_module")]
    return Counter(first[part] for part in called if part in first)


def check_call(model: nn.Module, inputs: Any) -> fx.GraphModule:
    """The graph of a call, in float64: it computes what the model does, with the same gradients and parameters."""
    model.double()
    found = hra_fx.graphs(model, inputs)
    assert list(found) == [""]
    graph, results = found[""], []
    for each in (model, graph):
        outputs = tensors_in(run(each, inputs))
        each.zero_grad()
        sum(output.float().pow(2).sum() for output in outputs).backward()  # type: ignore[union-attr]
        gradients = {name: p.grad.clone() for name, p in each.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (wanted, wanted_gradients), (given, found_gradients) = results
    # Without the cache that a language model returns.
    assert 0 < len(given) <= len(wanted)
    for one, other in zip(given, wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert found_gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-9, atol=1e-9)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    shared = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    assert all(own[name] is tensor for name, tensor in shared.items() if name in own)
    assert {name for name, _ in model.named_parameters()} <= shared.keys()
    graph.graph.lint()
    return graph


@pytest.mark.parametrize("fields", [{"r": 3}, {"apply_GS": True}], ids=str)
def test_each_use_of_a_layer_has_a_reflection(fields: dict[str, Any]) -> None:
    graph = check_call(branching(**fields), (image(), 2.0))
    assert reflections_in(graph) == {"conv": 1, "attention": 1, "attention.out_proj": 1, "head": 2}


def test_an_attention_is_rotated_though_nothing_is_trained() -> None:
    model = branching(inference_mode=True)
    inputs = (image(), 1.0)
    graph = hra_fx.graphs(model, inputs)[""]
    wanted = tensors_in(run(copy.deepcopy(model), inputs))
    torch.testing.assert_close(tensors_in(run(graph, inputs)), wanted, rtol=1e-12, atol=1e-12)


def test_a_graph_follows_the_state_of_the_adapters() -> None:
    model = branching()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=3, target_modules=["conv", "head"]))
    hra_fx.set_adapter(model, ["other", "default"])
    randomise(model)
    graph = check_call(model, image())
    hra_fx.set_scale(model, "default", 0.5)
    assert_same(graph(image()), model(image()))
    with hra_fx.disable_adapters(model):
        assert_same(graph(image()), model(image()))
    hra_fx.merge_adapter(model)
    assert_same(graph(image()), model(image()))
    assert_same(hra_fx.graphs(model, image())[""](image()), model(image()))


def test_trained_copies_are_in_the_graph() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["conv"], bias="all", modules_to_save=["norm"])
    model = hra_fx.transform(Branching().double().eval(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * parameter.requires_grad
    check_call(model, image())


class Tied(nn.Module):
    """An embedding and a head with one weight, and one layer by two names; fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 4), nn.Linear(4, 16, bias=False)
        self.head.weight = self.embed.weight
        self.first = self.second = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens if tokens.shape[0] < 100 else tokens[:100])
        hidden = self.second(self.first(hidden)) @ self.first.weight
        return self.head(hidden) + hidden @ self.head.weight.T - 2 * hidden @ self.embed.weight.T


def test_a_tied_weight_without_an_adapter_is_read_as_it_is() -> None:
    graph = check_call(adapted(Tied().double(), "first", "unused"), torch.randint(0, 16, (2, 4)))
    assert reflections_in(graph) == {"first": 3}  # two calls, and a read of the weight


def state_of(model: nn.Module) -> Any:
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    modes = [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    chance = torch.get_rng_state().tolist(), random.getstate()
    return tensors, flags, modes, attributes, chance, torch.is_grad_enabled()


class Breaks(Branching):
    """Neither torch.fx nor torch.export can trace it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.norm(self.conv(x)).mean((2, 3))
        return self.head(hidden if float(hidden.detach().sum()) > 0 else -hidden)


@pytest.mark.parametrize("kind", [Branching, Breaks])
def test_model_inputs_and_random_numbers_are_as_before(kind: type[nn.Module]) -> None:
    model = adapted(kind().double().train(), "conv", "head")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = image()
    before, version = state_of(model), x._version
    try:
        hra_fx.graphs(model, x)
    except AdapterError:
        assert kind is Breaks
    assert state_of(model) == before and x._version == version
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_a_call_that_torch_export_cannot_capture_is_refused() -> None:
    model = adapted(Breaks(), "head")
    with pytest.raises(AdapterError, match=r"capture Breaks: .*, line \d+, `return self\.head.*work without a graph"):
        hra_fx.graphs(model, image().float())


class Doubled(torch.autograd.Function):
    """Twice the input, with three times the gradient, so that a graph of its operators differs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0]


class Part(nn.Module):
    """A module without children, with its own parameter."""

    def __init__(self, forward: str = "") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.wanted = forward

    def forward(self, x: Tensor, shift: Any = None) -> Any:
        if self.wanted == "custom gradient":
            return Doubled.apply(x) * self.scale  # type: ignore[no-untyped-call]
        if self.wanted == "two tensors":
            return x * self.scale, x.sum(-1)
        if self.wanted == "in place":
            return x.clamp_(-4, 4)
        return x * self.scale if shift is None else x + shift * self.scale


class Parts(Branching):
    def __init__(self) -> None:
        super().__init__()
        self.gradient, self.pair, self.clamp = Part("custom gradient"), Part("two tensors"), Part("in place")
        self.shifted, self.hooked = Part(), Part()
        self.hooked.register_forward_hook(lambda *args: 2 * args[-1] + 1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        rows = self.gradient(self.norm(self.conv(x)).flatten(2).mT)
        rows, sums = self.pair(rows)
        self.clamp(rows)
        rows = self.shifted(rows, shift=sums.unsqueeze(-1))
        return self.head(self.hooked(rows[:100] if x.shape[0] > 100 else rows))


def test_a_module_without_children_that_maps_one_tensor_to_one_is_called() -> None:
    model = adapted(Parts().double(), "conv", "head")
    graph = check_call(model, image())
    called = {str(node.target) for node in graph.graph.find_nodes(op="call_module")}
    assert called >= {"gradient", "clamp", "norm", "hooked"}
    assert called.isdisjoint({"pair", "shifted"})
    assert_same(graph.float()(image().float()), model.float()(image().float()), rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(graph(image().float()), model(image().float()), rtol=1e-6)
