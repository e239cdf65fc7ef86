"""The class of an adapted model, called for a new object: a plain model of the base class, which runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layers.checking import dense_weights, normal, run_dense
from oracles import relative_error
from torch import Tensor, nn

import hra_fx

ways = pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
Way = Callable[..., Any]
X = normal(1, 3, 6)


class Net(nn.Module):
    """A model with arguments: `(n, 6) -> (n, 4)`."""

    def __init__(self, width: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x)))


class Branching(Net):
    """A model whose forward FX cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def config(*targets: str) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(r=2, target_modules=list(targets), init_weights=False)


@ways
def test_a_slice_of_an_adapted_sequential_runs_its_adapted_layers(way: Way) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    model = way(copy.deepcopy(base), config("0", "2"))
    whole = model(X)
    hidden = torch.relu(nn.functional.linear(X, dense_weights(base, model)["0.weight"], base[0].bias))
    first, last = model[:2], model[2:]
    assert (len(first), len(last)) == (2, 1)
    assert relative_error(first(X), hidden) < 1e-12
    assert relative_error(last(first(X)), whole) < 1e-12
    # The slice shares the layers, and the model is unchanged.
    assert first[0] is model[0]
    assert torch.equal(model(X), whole)


@ways
@pytest.mark.parametrize("kind", [Net, Branching])
def test_the_class_of_an_adapted_model_makes_a_plain_one_which_can_be_adapted(way: Way, kind: type[Net]) -> None:
    model = way(kind(4), config("first"))
    torch.manual_seed(3)
    built = type(model)(5, scale=2.0).double()
    torch.manual_seed(3)
    plain = kind(5, scale=2.0).double()
    assert isinstance(built, kind)
    assert built.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(built(X), plain(X))
    assert all(parameter.requires_grad for parameter in built.parameters())
    with pytest.raises(TypeError, match="width"):
        type(model)()
    adapted = way(built, config("first"))
    assert relative_error(adapted(X), plain(X)) > 1e-3
    assert relative_error(adapted(X), run_dense(plain, adapted, X)) < 1e-12


@pytest.mark.parametrize(
    ("kind", "sizes", "shape"),
    [(nn.Linear, (6, 2), (3, 6)), (nn.Conv2d, (6, 2, 1), (3, 6, 4, 4)), (nn.MultiheadAttention, (6, 2), (3, 6))],
)
def test_the_class_of_an_adapted_layer_makes_a_plain_layer(
    kind: Any, sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"layer": kind(*sizes), "other": nn.Linear(6, 2)})
    hra_fx.transform(model, config("layer"))
    plain, new = kind(*sizes), type(model["layer"])(*sizes)
    assert isinstance(new, kind) and list(new.state_dict()) == list(plain.state_dict())
    new.load_state_dict(plain.state_dict())
    args = (torch.randn(shape),) * (3 if kind is nn.MultiheadAttention else 1)
    outputs = [layer(*args) for layer in (plain, new, copy.deepcopy(new))]
    first = [output[0] if isinstance(output, tuple) else output for output in outputs]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])


_TEXT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
#: An adapted layer of each model, and how to make it.
TEXT_MODELS: dict[str, tuple[str, type[Any], type[Any]]] = {
    "bert": ("query", transformers.BertForSequenceClassification, transformers.BertConfig),
    "llama": ("q_proj", transformers.LlamaForCausalLM, transformers.LlamaConfig),
}
IDS = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


@ways
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_the_class_of_a_model_of_transformers_loads_and_saves_base_models(way: Way, kind: str, tmp_path: Path) -> None:
    target, made, settings = TEXT_MODELS[kind]
    torch.manual_seed(0)
    plain = made(settings(**_TEXT, max_position_embeddings=32, initializer_range=0.4)).double().eval()
    plain.save_pretrained(tmp_path)
    model = way(copy.deepcopy(plain), config(target))
    before = logits(model)
    built = type(model)(model.config).double()
    assert isinstance(built, made)
    built.load_state_dict(plain.state_dict())
    assert torch.equal(logits(built), logits(plain))
    built.save_pretrained(tmp_path / "again")
    for loaded in (
        model.from_pretrained(tmp_path, dtype=torch.float64),
        type(model).from_pretrained(tmp_path, dtype=torch.float64),
        made.from_pretrained(tmp_path / "again", dtype=torch.float64),
    ):
        assert isinstance(loaded, made)
        assert loaded.state_dict().keys() == plain.state_dict().keys()
        # Rotary frequencies are computed in float32 here, and were converted to float64 there.
        assert relative_error(logits(loaded), logits(plain)) < 1e-6
    assert torch.equal(logits(model), before)
