"""The class of an adapted model, called for a new object: a plain model of the base class, which runs."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import transformers
from layers.checking import dense_weights, normal, run_dense
from oracles import relative_error
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import hra_fx

WAYS: dict[str, Callable[..., Any]] = {"transform": hra_fx.transform, "HRAModel": hra_fx.HRAModel}
ways = pytest.mark.parametrize("way", WAYS)


class Branching(nn.Module):
    """A model whose forward FX cannot trace: `(n, 6) -> (n, 2)`."""

    def __init__(self, width: int = 8, *, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))
        self.head = nn.Linear(4, 2)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.scale * self.head(self.body(x))


class Net(nn.Module):
    """A model with arguments: `(n, 6) -> (n, width)`."""

    def __init__(self, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()


def config(*targets: str) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(r=2, target_modules=list(targets), init_weights=False)


def x(count: int = 3) -> Tensor:
    return normal(1, count, 6)


_TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
#: An adapted layer of each model, and how to make it.
TEXT_MODELS: dict[str, tuple[str, type[Any], type[Any]]] = {
    "bert": ("query", transformers.BertForSequenceClassification, transformers.BertConfig),
    "llama": ("q_proj", transformers.LlamaForCausalLM, transformers.LlamaConfig),
}
texts = pytest.mark.parametrize("kind", TEXT_MODELS)
IDS = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(1))


def text_model(kind: str) -> Any:
    _, model, settings = TEXT_MODELS[kind]
    torch.manual_seed(0)
    return model(settings(**_TEXT, max_position_embeddings=32, initializer_range=0.4)).double().eval()


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@ways
def test_a_slice_of_an_adapted_sequential_runs_its_adapted_layers(way: str) -> None:
    base = sequential()
    model = WAYS[way](copy.deepcopy(base), config("0", "2"))
    whole = model(x())
    rotated = dense_weights(base, model)
    hidden = torch.relu(nn.functional.linear(x(), rotated["0.weight"], base[0].bias))
    first, last = model[:2], model[2:]
    assert (len(first), len(last)) == (2, 1)
    assert relative_error(first(x()), hidden) < 1e-12
    assert relative_error(last(first(x())), whole) < 1e-12
    assert relative_error(first(x()), base[:2](x())) > 1e-3
    # The slice shares the layers, and the model is as it was.
    assert first[0] is model[0]
    assert torch.equal(model(x()), whole)


@ways
def test_gradients_arrive_through_a_slice(way: str) -> None:
    model = WAYS[way](sequential(), config("0", "2"))
    model(x()).sum().backward()
    wanted = model[0].hra_u["default"].grad.clone()
    model.zero_grad()
    model[1:](model[:1](x())).sum().backward()
    assert relative_error(model[0].hra_u["default"].grad, wanted) < 1e-10


@ways
def test_a_slice_of_a_part_runs_where_the_model_as_a_whole_cannot_be_traced(way: str) -> None:
    torch.manual_seed(0)
    base = Branching().double()
    model = WAYS[way](copy.deepcopy(base), config("body.0", "body.2"))
    rotated = dense_weights(base, model)
    hidden = torch.relu(nn.functional.linear(x(), rotated["body.0.weight"], base.body[0].bias))
    assert relative_error(model.body[:2](x()), hidden) < 1e-12
    assert relative_error(model.body[2:](hidden), model.body(x())) < 1e-12


def test_a_slice_follows_the_adapter_that_acts() -> None:
    model = hra_fx.HRAModel(sequential(), config("0", "2"), "a")
    model.add_adapter("b", config("0"))
    first = model[:1]
    with_a = first(x())
    model.set_adapter("b")
    assert torch.equal(first(x()), model[0](x()))
    assert relative_error(first(x()), with_a) > 1e-3
    with model.disable_adapter():
        assert torch.equal(first(x()), sequential()[:1](x()))


@ways
@pytest.mark.parametrize("arguments", [((5,), {}), ((7,), {"bias": False})])
def test_the_class_of_an_adapted_model_makes_a_plain_one(way: str, arguments: tuple[Any, Any]) -> None:
    args, kwargs = arguments
    model = WAYS[way](Net(4), config("first"))
    torch.manual_seed(3)
    built = type(model)(*args, **kwargs)
    torch.manual_seed(3)
    plain = Net(*args, **kwargs)
    assert isinstance(built, Net)
    assert built.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(built(x().float()), plain(x().float()))
    assert all(parameter.requires_grad for parameter in built.parameters())
    with pytest.raises(TypeError, match="width"):
        type(model)()


@ways
def test_the_class_of_a_part_makes_a_plain_one_too(way: str) -> None:
    model = WAYS[way](Branching().double(), config("body.0", "body.2"))
    torch.manual_seed(3)
    layers = [nn.Linear(6, 2), nn.Tanh()]
    part = type(model.body)(*layers)
    assert torch.equal(part(x().float()), nn.Sequential(*layers)(x().float()))
    torch.manual_seed(3)
    whole = type(model)(5, scale=2.0)
    torch.manual_seed(3)
    assert torch.equal(whole(x().float()), Branching(5, scale=2.0)(x().float()))


@ways
def test_a_resnet_is_made_again_by_its_class(way: str) -> None:
    model = WAYS[way](torchvision.models.resnet18(), config("conv1"))
    torch.manual_seed(3)
    built = type(model)(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    torch.manual_seed(3)
    plain = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).eval()
    images = torch.randn(1, 3, 32, 32)
    assert built.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(built(images), plain(images))


@ways
def test_the_signature_is_that_of_the_base_class(way: str) -> None:
    for base, targets in ((Net(4), "first"), (Branching(), "head"), (sequential(), "0")):
        kind = type(base)
        model = WAYS[way](base, config(targets))
        assert inspect.signature(type(model).__init__) == inspect.signature(kind.__init__)
        assert type(model).__init__.__doc__ == kind.__init__.__doc__
        assert type(model).__name__ == kind.__name__


@ways
def test_a_new_object_is_copied_and_pickled(way: str) -> None:
    model = WAYS[way](Net(4), config("first"))
    built = type(model)(4)
    for other in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert isinstance(other, Net)
        assert torch.equal(other(x().float()), built(x().float()))


@ways
@pytest.mark.parametrize("make", [lambda: (Net(4), "first"), lambda: (Branching(), "body.0")], ids=["whole", "parts"])
def test_a_new_object_can_be_adapted_itself(way: str, make: Callable[[], Any]) -> None:
    base, target = make()
    model = WAYS[way](base, config(target))
    built = type(model)(4).double()
    plain = make()[0].__class__(4).double()
    plain.load_state_dict(built.state_dict())
    adapted = WAYS[way](built, config(target))
    assert relative_error(adapted(x()), plain(x())) > 1e-3
    assert relative_error(adapted(x()), run_dense(plain, adapted, x())) < 1e-12


@ways
@texts
def test_a_model_of_transformers_is_made_again_from_its_config(way: str, kind: str, tmp_path: Path) -> None:
    base = text_model(kind)
    target = TEXT_MODELS[kind][0]
    plain = copy.deepcopy(base)
    model = WAYS[way](base, config(target))
    built = type(model)(model.config).double().eval()
    assert isinstance(built, type(plain))
    assert {key: t.shape for key, t in built.state_dict().items()} == {
        key: t.shape for key, t in plain.state_dict().items()
    }
    built.load_state_dict(plain.state_dict())
    assert torch.equal(logits(built), logits(plain))


@ways
@texts
def test_such_a_model_of_transformers_is_saved_whole(way: str, kind: str, tmp_path: Path) -> None:
    plain = text_model(kind)
    target = TEXT_MODELS[kind][0]
    model = WAYS[way](text_model(kind), config(target))
    built = type(model)(model.config).double().eval()
    built.load_state_dict(plain.state_dict())
    built.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    again = type(plain).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(again) is type(plain)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@ways
@texts
def test_from_pretrained_of_an_adapted_model_loads_a_base_model(way: str, kind: str, tmp_path: Path) -> None:
    plain = text_model(kind)
    plain.save_pretrained(tmp_path)
    target = TEXT_MODELS[kind][0]
    model = WAYS[way](text_model(kind), config(target))
    before = logits(model)
    for loaded in (
        model.from_pretrained(tmp_path, dtype=torch.float64),
        type(model).from_pretrained(tmp_path, dtype=torch.float64),
    ):
        assert isinstance(loaded, type(plain))
        assert not any("hra_" in key for key in loaded.state_dict())
        # Rotary frequencies are made in float32 here, and were made wider there.
        assert relative_error(logits(loaded.eval()), logits(plain)) < 1e-6
    assert torch.equal(logits(model), before)


def test_auto_classes_know_the_model_by_its_config_as_before() -> None:
    model = hra_fx.HRAModel(text_model("bert"), config("query"))
    built = transformers.AutoModelForSequenceClassification.from_config(model.config)
    assert type(built) is transformers.BertForSequenceClassification
