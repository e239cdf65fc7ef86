"""Output layers that transformers ties to the embeddings: untied and adapted, trained in full, saved, resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from integrations.transformers_use.tied import VOCABULARY, Case, case, logits
from model.many import refuses
from oracles import relative_error
from torch import nn

import hra_fx


def untied(kind: str) -> Case:
    """A model whose head has its own values."""
    made = case(kind)
    made.model.config.tie_word_embeddings = False
    head = made.model.get_submodule(made.head)
    generator = torch.Generator().manual_seed(3)
    head.weight = nn.Parameter(torch.randn(head.weight.shape, dtype=torch.float64, generator=generator))
    return made


def transformed(made: Case, *targets: str, **fields: Any) -> Any:
    model = hra_fx.transform(made.model, hra_fx.HRAConfig(**{"r": 3, "target_modules": [*targets], **fields}))
    randomise(model)
    return model


def reloaded(model: Any, folder: Path) -> Any:
    """What transformers reads from what it writes; nothing in it is new or left over."""
    model.save_pretrained(folder)
    other, told = type(model).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(told.values()), told
    return other.eval()


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_trained_copy_of_a_tied_head_is_folded_and_a_saved_model_loads_equal(kind: str, tmp_path: Path) -> None:
    made = case(kind)
    keys, embedding = list(made.model.state_dict()), made.model.get_submodule(made.embedding)
    before = embedding.weight.detach().clone()
    with pytest.warns(hra_fx.HRAWarning, match=rf"^{made.head}\.weight is tied to "):
        model = transformed(made, made.inside, modules_to_save=[made.head])
    wanted = logits(model)
    with pytest.warns(hra_fx.HRAWarning, match=r"config\.tie_word_embeddings is now False\.$"):
        hra_fx.fold(model)
    assert torch.equal(embedding.weight, before)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert relative_error(logits(model), wanted) < 1e-12
    assert relative_error(logits(reloaded(model, tmp_path)), wanted) < 1e-12
    model.tie_weights()
    assert relative_error(logits(model), wanted) < 1e-12


def test_a_trained_copy_of_one_of_several_tied_weights_is_not_folded() -> None:
    with pytest.warns(hra_fx.HRAWarning, match=r"^lm_head\.weight is tied to "):
        model = transformed(case("t5"), "q", modules_to_save=["lm_head"])
    text = r"ForConditionalGeneration: a trained copy of one of several tied weights cannot be folded, because config"
    with refuses(model, text, hra_fx.FoldError):
        hra_fx.fold(model)


def test_a_model_with_adapters_is_not_resized() -> None:
    model = transformed(untied("llama"), "lm_head")
    with refuses(model, "^LlamaForCausalLM: resize_token_embeddings could lose adapters and trained copies"):
        model.resize_token_embeddings(VOCABULARY + 8)
