"""Weights that share memory: adapting one of them is refused, and a trained copy of one is a tensor of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, ids, llama, refuses, run, turn, weights
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import FoldError, UnsupportedLayerError

TOKENS = torch.arange(9)


class Tied(nn.Module):
    """An embedding, a body, and a head whose weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))  # type: ignore[no-any-return]


def tied_pair(first: nn.Module, second: nn.Module, rows: slice | None = None) -> Any:
    """Two layers with one weight; or the weight of the second is a view of these rows."""
    model: Any = nn.Sequential(first, second).double().to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight if rows is None else nn.Parameter(model[0].weight.detach()[rows])
    return model


@pytest.mark.parametrize(
    ("make", "targets", "path", "others"),
    [
        (Tied, ["body", "head"], "head", "embed.weight"),
        (lambda: tied_pair(nn.Linear(6, 6), nn.Linear(6, 6)), ["0", "1"], "0", "1.weight"),
        (lambda: tied_pair(nn.Linear(6, 6), nn.Linear(6, 6)), ["1"], "1", "0.weight"),
        (lambda: tied_pair(nn.Linear(6, 6), nn.Linear(6, 4), slice(1, 5)), ["1"], "1", "0.weight"),
        (lambda: tied_pair(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), ["0"], "0", "1.weight"),
    ],
)
def test_one_of_two_tied_weights_is_not_adapted(
    make: Callable[[], Any], targets: list[str], path: str, others: str
) -> None:
    """The error has the code that unties it. Then it is adapted and folded, and the other one keeps its values."""
    model, text = make(), rf"^{path} \(\w+\): its weight is tied to {others}\. Untie it"
    with refuses(model, text, UnsupportedLayerError) as caught:
        hra_fx.transform(model, config(*targets))
    exec(str(caught.value).split("Untie it first: ")[1].split(", and in")[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, model = adapted(model, a=config(path))
    wanted = before | weights(plain, model, ["a"])
    hra_fx.fold(model)
    for name, value in model.state_dict().items():
        assert_close(value, wanted[name], 1e-12)


def test_tied_weights_without_values_are_not_adapted_either() -> None:
    with torch.device("meta"):
        model = Tied()
    with refuses(model, "its weight is tied to", UnsupportedLayerError):
        hra_fx.transform(model, config("head"))


def test_two_halves_of_one_memory_are_not_tied() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4)).double()
    model[0].weight, model[1].weight = map(nn.Parameter, torch.randn(8, 6, dtype=F64).split(4))
    plain, model = adapted(model, a=config("0", "1"))
    wanted = weights(plain, model, ["a"])
    hra_fx.fold(model)
    for name, value in wanted.items():
        assert_close(model.get_parameter(name), value, 1e-12)


@pytest.mark.parametrize("act", [hra_fx.fold, hra_fx.merge_adapter])
def test_a_weight_that_is_tied_later_is_not_written(act: Callable[[Any], object]) -> None:
    base: Any = Tied()
    base.head.weight = nn.Parameter(base.head.weight.detach().clone())
    model = adapted(base, a=config("head", "body"))[1]
    model.head.weight = model.embed.weight
    with refuses(model, r"^head\.weight: it shares memory with embed\.weight, .* Untie it first: model\.", FoldError):
        act(model)


# ---- a trained copy of an output layer whose weight is tied to the embedding ----


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    assert is_tied(model)
    return model


def is_tied(model: nn.Module) -> bool:
    """Whether the weights are one parameter; the configuration must agree."""
    one = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is one
    return one


def copied(*names: str) -> Any:
    model = tied()
    with pytest.warns(hra_fx.HRAWarning, match=r"tokens\.weight and lm_head\.weight are tied, and adapter 'default'"):
        return hra_fx.transform(model, config("q_proj", modules_to_save=[*names]))


def test_the_trained_copy_survives_tie_weights_and_the_embedding_stays() -> None:
    model = copied("lm_head")
    embedding = model.model.embed_tokens.weight.detach().clone()
    turn(model)
    wanted, before = run(model, ids()), model.lm_head.weight.detach().clone()
    assert not torch.equal(before, embedding)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(run(model, ids()), wanted)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.model.embed_tokens.weight.requires_grad
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, ids()), run(tied(), ids()))
        assert is_tied(model)
    hra_fx.delete_adapter(model, "default")
    assert is_tied(model)
    model.tie_weights()
    assert is_tied(model)


def test_trained_copies_of_both_stay_one_parameter() -> None:
    model = hra_fx.transform(tied(), config("q_proj", modules_to_save=["embed_tokens", "lm_head"]))
    turn(model)
    wanted = run(model, ids()).detach()
    model.tie_weights()
    assert is_tied(model)
    hra_fx.fold(model)
    assert is_tied(model)
    assert torch.allclose(run(model, ids()), wanted, rtol=1e-9, atol=1e-9)
