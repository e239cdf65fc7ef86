"""A trained copy of an output layer whose weight is tied to the embedding: it stays apart until it goes."""

from __future__ import annotations

import pytest
import torch
from model.many import config, ids, llama, moved, run, turn
from torch import nn

import hra_fx


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


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


def test_the_base_model_is_there_while_it_is_off() -> None:
    model, _ = trained()
    base = run(tied(), ids())
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, ids()), base)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert moved(run(model, ids()), base)


def test_taking_it_off_ties_again() -> None:
    model, embedding = trained()
    assert model.config.tie_word_embeddings is False
    hra_fx.delete_adapter(model, "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    assert torch.equal(model.lm_head.weight, embedding)


def test_unload_ties_again() -> None:
    model = hra_fx.HRAModel(tied(), config("q_proj", modules_to_save=["lm_head"]))
    turn(model)
    plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings is True
    assert torch.equal(run(plain, ids()), run(tied(), ids()))


def test_a_fold_leaves_them_untied_and_says_so() -> None:
    model, embedding = trained()
    wanted = run(model, ids()).detach()
    text = r"^embeddings stay untied because one was trained; config\.tie_word_embeddings is False now\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.fold(model)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(run(model, ids()), wanted, rtol=1e-9, atol=1e-9)
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, embedding)


def test_two_adapters_of_which_one_unties() -> None:
    model, _ = trained()
    hra_fx.add_adapter(model, "b", config("q_proj", "v_proj"))
    hra_fx.delete_adapter(model, "b")
    assert model.config.tie_word_embeddings is False
    hra_fx.add_adapter(model, "b", config("q_proj"))
    with pytest.warns(hra_fx.HRAWarning, match="'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    assert model.config.tie_word_embeddings is True


def test_an_adapter_that_is_refused_leaves_them_tied() -> None:
    model = tied()
    with pytest.raises(hra_fx.SelectionError):
        hra_fx.transform(model, config("nothing", modules_to_save=["lm_head"]))
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
