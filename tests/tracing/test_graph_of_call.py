"""`hra_fx.graphs(model, example_inputs)`: one graph that computes what the model does, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_calls import (
    TOKENS,
    Branching,
    adapted,
    bert,
    branching,
    check_call,
    gpt2,
    image,
    llama,
    mamba,
    reflections_in,
    run,
    t5,
    tensors_in,
    turned,
)
from graph_modules import X, traced
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.errors import AdapterError


@pytest.mark.parametrize(
    "make", [llama, *(pytest.param(make, marks=pytest.mark.slow) for make in (bert, t5, gpt2, mamba))]
)
def test_a_model_of_transformers_is_one_graph(make: Callable[[], nn.Module]) -> None:
    labels = torch.tensor([0, 1]) if make is bert else TOKENS
    model = make()
    graph = check_call(model, {"input_ids": TOKENS, "labels": labels})
    assert reflections_in(graph) == {row.path: 1 for row in hra_fx.report(model)}
    assert [node.target for node in graph.graph.find_nodes(op="placeholder")] == ["input_ids", "labels"]


@pytest.mark.slow
def test_a_unet_of_diffusers_is_one_graph() -> None:
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 4}
    model = UNet2DConditionModel(sample_size=4, norm_num_groups=4, mid_block_type=None, **blocks, **sizes).eval()
    inputs = {
        "sample": torch.randn(1, 4, 4, 4).double(),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 3, 8).double(),
    }
    check_call(adapted(model, r".*(to_q|to_v|conv1|conv_in|conv_out)"), inputs)


class Scaled(nn.Module):
    """fx traces it, with the optional argument at its default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.conv(x) * scale


def test_a_call_that_the_graph_of_fx_covers_gives_that_graph() -> None:
    model = adapted(Scaled().double(), ["conv"])
    assert hra_fx.graphs(model, image())[""].code == hra_fx.graphs(model)[""].code
    assert reflections_in(check_call(model, (image(), 3.0))) == {"conv": 1}


@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"apply_GS": True}, {"r": 3, "init_weights": False}], ids=str)
def test_each_use_of_a_layer_has_a_reflection(fields: dict[str, Any]) -> None:
    graph = check_call(branching(**fields), (image(), 2.0))
    assert reflections_in(graph) == {"conv": 1, "attention": 1, "attention.out_proj": 1, "head": 2}


@pytest.mark.parametrize("training", [False, True])
def test_an_attention_is_rotated_whatever_is_trained(training: bool) -> None:
    model = branching(inference_mode=True).train(training)
    inputs = (image(), 1.0)
    graph = hra_fx.graphs(model, inputs)[""]
    torch.manual_seed(5)
    wanted = tensors_in(run(copy.deepcopy(model), inputs))
    torch.manual_seed(5)
    torch.testing.assert_close(tensors_in(run(graph, inputs)), wanted, rtol=1e-12, atol=1e-12)


def check_output(model: nn.Module, graph: fx.GraphModule) -> None:
    torch.testing.assert_close(tensors_in(graph(image())), tensors_in(model(image())), rtol=1e-12, atol=1e-12)


def test_a_graph_follows_the_state_of_the_adapters() -> None:
    model = branching()
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=3, target_modules=["conv", "head"]))
    hra_fx.set_adapter(model, ["other", "default"])
    graph = check_call(turned(model), image())
    hra_fx.set_scale(model, "default", 0.5)
    check_output(model, graph)
    with hra_fx.disable_adapters(model):
        check_output(model, graph)
    hra_fx.merge_adapter(model)
    check_output(model, graph)
    check_output(model, hra_fx.graphs(model, image())[""])


def test_trained_copies_are_in_the_graph() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["conv"], bias="all", modules_to_save=["norm"])
    model = turned(hra_fx.transform(Branching().double().eval(), config))
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
        return self.head(self.second(self.first(hidden)) @ self.first.weight)


def test_only_the_adapted_layer_of_a_tied_weight_is_rotated() -> None:
    graph = check_call(adapted(Tied().double(), ["head", "first", "unused"]), TOKENS)
    assert reflections_in(graph) == {"head": 1, "first": 3}  # two calls, and a read of the weight


class Holder(nn.Module):
    """A GraphModule inside of a model that fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = traced()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.shape[0] < 100 else x[:100])


def test_a_graph_module_in_a_model_is_inlined() -> None:
    model = Holder()
    hra_fx.transform(model.inner, hra_fx.HRAConfig(r=2, target_modules=["first", "second"]))
    code = turned(model).inner.code
    graph = check_call(model, X)
    assert reflections_in(graph) == {"inner.first": 2, "inner.second": 2} and model.inner.code == code


def test_graphs_are_copied() -> None:
    graph = hra_fx.graphs(branching(), image())[""]
    other = copy.deepcopy(graph)
    torch.testing.assert_close(other(image()), graph(image()), rtol=0, atol=0)
    assert reflections_in(other) == reflections_in(graph)


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
    model = adapted(kind().double().train(), ["conv", "head"])
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = image()
    before, version = state_of(model), x._version
    try:
        hra_fx.graphs(model, x)
    except AdapterError:
        assert kind is Breaks
    assert state_of(model) == before and x._version == version
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_models_are_compiled_and_exported_as_ever_afterwards() -> None:
    model = branching()
    hra_fx.graphs(model, image())
    expected = model(image())
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(image())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    exported = torch.export.export(model, (image(),)).module()
    torch.testing.assert_close(exported(image()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inputs", [3, "x", {1.0}], ids=str)
def test_example_inputs_of_another_kind_are_refused(inputs: Any) -> None:
    with pytest.raises(
        AdapterError, match=f"^example_inputs must be a tensor, a tuple .*, got {type(inputs).__name__}"
    ):
        hra_fx.graphs(branching(), inputs)


ADVICE = r"Without example_inputs, hra_fx\.graphs and hra_fx\.visualize use torch\.fx"


def test_a_call_that_torch_export_cannot_capture_is_refused() -> None:
    model = adapted(Breaks(), ["head"])
    with pytest.raises(AdapterError, match=rf"capture Breaks: .*, line \d+, `return self.head.*{ADVICE}"):
        hra_fx.graphs(model, image().float())


def test_inputs_on_which_the_model_does_not_run_are_refused() -> None:
    with pytest.raises(AdapterError, match=rf"torch\.export cannot capture Branching: .*, line \d+, .*{ADVICE}"):
        hra_fx.graphs(branching(), torch.randn(2, 5, 3, 3))
