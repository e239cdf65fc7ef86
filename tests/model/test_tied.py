"""Weights that share memory: a fold gives the layer its own and leaves the others alone, bit for bit.

`integrations/transformers_use/test_untying.py` does the same with models of transformers and their configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, ids, llama, refuses, run, stored, turn, weights
from torch import Tensor, nn

import hra_fx


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


TOKENS = torch.arange(9)
UNTIED = "untied: {}. Each now has its own weight, so a saved model is larger."


def folds(model: nn.Module, untied: str, names: str | None = None) -> None:
    """Fold, and compare the whole message of the one warning."""
    with pytest.warns(hra_fx.HRAWarning) as caught:
        hra_fx.fold(model, names)
    assert [str(warning.message) for warning in caught] == [UNTIED.format(untied)]


def test_a_plan_names_what_is_untied() -> None:
    """The fold of tied embeddings is tested with models of transformers."""
    _, model = adapted(Tied(), a=config("head", "body", r=3))
    plan = hra_fx.plan_fold(model)
    assert {layer.path: layer.untied for layer in plan.layers} == {"body": (), "head": ("embed.weight",)}
    assert re.search(r"^head .* untied from embed\.weight$", str(plan), re.MULTILINE)
    assert "untied" not in next(line for line in str(plan).splitlines() if line.startswith("body"))


def test_a_tied_head_stays_tied_if_the_folded_adapter_does_not_have_it() -> None:
    plain, model = adapted(Tied(), a=config("body"), b=config("head"))
    wanted = weights(plain, model, ["a"])["body.weight"]
    hra_fx.fold(model, "a")
    assert_close(model.body.weight, wanted, 1e-12)
    assert model.head.hra_base is model.embed.weight
    assert list(model.head.hra_u) == ["b"]


def test_one_of_two_adapters_of_a_tied_head_is_folded_and_the_other_still_acts() -> None:
    plain, model = adapted(Tied(), a=config("head", r=3), b=config("head"))
    hra_fx.set_adapter(model, ["a", "b"])
    output, wanted = model(TOKENS).detach(), weights(plain, model, ["a"])["head.weight"]
    folds(model, "head (from embed.weight)", "a")
    assert_close(model.head.hra_base, wanted, 1e-12)
    assert not model.head.hra_base.requires_grad
    assert_close(model(TOKENS), output, 1e-12)
    assert torch.equal(model.embed.weight, plain.embed.weight)
    hra_fx.fold(model)
    assert_close(model(TOKENS), output, 1e-12)
    assert model.head.weight.requires_grad


def one_parameter() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[1].weight = model[0].weight
    return model


def a_view() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double()
    model[1].weight = nn.Parameter(model[0].weight.detach()[1:5])
    return model


def a_buffer() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 4)).double()
    model[0].register_buffer("mirror", model[0].weight.detach())
    return model


def channels_last() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).double().to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "paths", "untied"),
    [
        (one_parameter, ["0", "1"], "0 (from 1.weight), 1 (from 0.weight)"),
        (one_parameter, ["1"], "1 (from 0.weight)"),
        (a_view, ["1"], "1 (from 0.weight)"),
        (a_buffer, ["0"], "0 (from 0.mirror)"),
        (channels_last, ["0"], "0 (from 1.weight)"),
    ],
)
def test_tensors_over_one_memory_are_separated(make: Callable[[], nn.Module], paths: list[str], untied: str) -> None:
    torch.manual_seed(0)
    base = make()
    plain, model = adapted(base, a=config(*paths))
    wanted = dict(plain.state_dict()) | weights(plain, model, ["a"])
    strides = [stored(model, f"{path}.weight").stride() for path in paths]
    folds(model, untied)
    for name, value in model.state_dict().items():
        if name in (f"{path}.weight" for path in paths):
            assert_close(value, wanted[name], 1e-12)
            assert value.untyped_storage().nbytes() == value.nbytes
        else:
            assert torch.equal(value, wanted[name])
    assert [stored(model, f"{path}.weight").stride() for path in paths] == strides


def test_an_untied_weight_of_a_layer_with_two_paths_can_be_trained() -> None:
    base: Any = Tied()
    base.again = base.head
    model = adapted(base, a=config("head"))[1]
    with torch.inference_mode():
        folds(model, "head (from embed.weight)")
    assert model.again is model.head
    assert model.head.weight is not model.embed.weight
    model(TOKENS).sum().backward()
    assert model.head.weight.grad is not None


def test_a_fold_that_fails_and_a_merge_leave_all_tied() -> None:
    model = adapted(Tied(), a=config("head", "body"))[1]
    text = (
        "head.weight: it shares memory with embed.weight, which merging in place would change too. Untie it first "
        "(layer.weight = torch.nn.Parameter(layer.weight.detach().clone()) and config.tie_word_embeddings = False), or "
        "call hra_fx.fold, which unties it."
    )
    with refuses(model, f"^{re.escape(text)}$", hra_fx.FoldError):
        hra_fx.merge_adapter(model)
    with torch.no_grad():
        model.body.hra_u["a"].fill_(float("nan"))
    with refuses(model, "not finite", hra_fx.FoldError):
        hra_fx.fold(model)
    assert model.head.hra_base is model.embed.weight


def test_a_reflected_head_and_a_trained_copy_of_its_embedding() -> None:
    plain, model = adapted(Tied(), a=config("head", modules_to_save=["embed"]))
    trained, output = model.embed.weight.detach().clone(), model(TOKENS).detach()
    wanted = weights(plain, model, ["a"])["head.weight"]
    assert not torch.equal(trained, plain.embed.weight)
    # The base model's embedding is removed by the fold, so nothing is left to untie from.
    assert {layer.untied for layer in hra_fx.plan_fold(model).layers} == {()}
    hra_fx.fold(model)
    assert torch.equal(model.embed.weight, trained)
    assert_close(model.head.weight, wanted, 1e-12)
    assert_close(model(TOKENS), output, 1e-12)


# ---- a trained copy of an output layer whose weight is tied to the embedding: untied while the copy exists ----


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    assert is_tied(model)
    return model


def is_tied(model: nn.Module) -> bool:
    """Whether the weights are one parameter, which the configuration must say too."""
    one = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is one
    return one


def test_the_trained_copy_survives_tie_weights_and_the_embedding_stays() -> None:
    model = tied()
    embedding = model.model.embed_tokens.weight.detach().clone()
    hra_fx.transform(model, config("q_proj", modules_to_save=["lm_head"]))
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
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_fold_leaves_them_untied_with_their_flags_and_warns(name: str) -> None:
    model = hra_fx.transform(tied(), config("q_proj", modules_to_save=[name]))
    turn(model)
    embedding, wanted = model.model.embed_tokens.weight.detach().clone(), run(model, ids()).detach()
    text = r"^the embeddings remain untied because one of them was trained; config\.tie_word_embeddings is now False\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.fold(model)
    assert not is_tied(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(run(model, ids()), wanted, rtol=1e-9, atol=1e-9)
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_fold_of_another_adapters_copies_leaves_the_configuration_as_it_is() -> None:
    biases = config("q_proj", bias="hra_only")
    model = hra_fx.transform(llama(tie_word_embeddings=True, attention_bias=True), biases, "a")
    hra_fx.add_adapter(model, "b", config("v_proj", modules_to_save=["lm_head"]))
    hra_fx.add_adapter(model, "c", biases)
    hra_fx.fold(model, "a")
    assert model.config.tie_word_embeddings is False
    hra_fx.set_adapter(model, "b")
    turn(model)
    wanted = run(model, ids())
    model.tie_weights()
    assert torch.equal(run(model, ids()), wanted)
    hra_fx.set_adapter(model, "c")
    hra_fx.delete_adapter(model, "b")
    assert is_tied(model)
    hra_fx.fold(model)
    assert is_tied(model)
