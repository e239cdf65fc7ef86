"""A trained copy of an output layer whose weight is tied to the embedding: untied while the copy exists."""

from __future__ import annotations

import pytest
import torch
from model.many import config, ids, llama, moved, run, turn
from torch import nn

import hra_fx


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    assert is_tied(model)
    return model


def is_tied(model: nn.Module) -> bool:
    """Whether the weights are one parameter, which the configuration must say too."""
    one = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is one
    return one


def trained() -> tuple[nn.Module, torch.Tensor]:
    model = tied()
    embedding = model.model.embed_tokens.weight.detach().clone()
    hra_fx.transform(model, config("q_proj", modules_to_save=["lm_head"]), "a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    run(model, ids()).square().mean().backward()
    optimizer.step()
    return model, embedding


def test_the_trained_copy_survives_tie_weights_and_the_embedding_stays() -> None:
    model, embedding = trained()
    assert not torch.equal(model.lm_head.weight, embedding)
    wanted, before = run(model, ids()), model.lm_head.weight.detach().clone()
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(run(model, ids()), wanted)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.model.embed_tokens.weight.requires_grad
    base = run(tied(), ids())
    assert moved(wanted, base)
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, ids()), base)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unload_ties_again() -> None:
    model = hra_fx.HRAModel(tied(), config("q_proj", modules_to_save=["lm_head"]))
    turn(model)
    plain = model.unload()
    assert is_tied(plain)
    assert torch.equal(run(plain, ids()), run(tied(), ids()))


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


def test_the_configuration_follows_whether_any_adapter_has_a_copy() -> None:
    model, embedding = trained()
    hra_fx.add_adapter(model, "b", config("q_proj", "v_proj"))
    hra_fx.delete_adapter(model, "b")
    assert model.config.tie_word_embeddings is False
    hra_fx.add_adapter(model, "b", config("q_proj"))
    with pytest.warns(hra_fx.HRAWarning, match="'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    assert is_tied(model)
    assert torch.equal(model.lm_head.weight, embedding)


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


def test_an_adapter_that_is_refused_leaves_them_tied() -> None:
    model = tied()
    with pytest.raises(hra_fx.SelectionError):
        hra_fx.transform(model, config("nothing", modules_to_save=["lm_head"]))
    assert is_tied(model)
