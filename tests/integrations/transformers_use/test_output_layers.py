"""Output layers that transformers ties to the embeddings: trained in full, folded, saved, resized."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapting import config, randomise
from model.many import refuses
from oracles import relative_error
from torch import Tensor

import hra_fx

SMALL: dict[str, Any] = tiny.SMALL | {"vocab_size": 32}
LLAMA = partial(tiny.llama, **SMALL, num_key_value_heads=2)
#: A model, the path of its output layer, what that is tied to, and a target inside.
TIED = [
    (partial(LLAMA, tie_word_embeddings=True), "lm_head", "model.embed_tokens", "q_proj"),
    (
        partial(tiny.bert, "BertForMaskedLM", **SMALL),
        *("cls.predictions.decoder", "bert.embeddings.word_embeddings", "query"),
    ),
]


def transformed(model: Any, *targets: str, **fields: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.double().eval().named_parameters():
            if name.endswith("bias"):  # zero at the start
                parameter.normal_()
    hra_fx.transform(model, config(*targets, **fields))
    randomise(model)
    return model


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(3, 15).view(2, 6)).logits
    return found


@pytest.mark.parametrize(("make", "head", "tied_to", "inside"), TIED)
def test_a_trained_copy_of_a_tied_head_is_folded_and_a_saved_model_loads_equal(
    make: Any, head: str, tied_to: str, inside: str, tmp_path: Path
) -> None:
    base = make()
    keys, embedding = list(base.state_dict()), base.get_submodule(tied_to)
    assert base.get_submodule(head).weight is embedding.weight
    with pytest.warns(hra_fx.HRAWarning, match=rf"{head}\.weight.* are tied, and adapter"):
        model = transformed(base, inside, modules_to_save=[head])
    wanted, before = logits(model), embedding.weight.detach().clone()
    with pytest.warns(hra_fx.HRAWarning, match=r"config\.tie_word_embeddings is now False\.$"):
        hra_fx.fold(model)
    assert torch.equal(embedding.weight, before)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert relative_error(logits(model), wanted) < 1e-12
    model.save_pretrained(tmp_path)
    other, told = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(told.values()), "nothing is new or left over"
    assert relative_error(logits(other.eval()), wanted) < 1e-12
    model.tie_weights()
    assert relative_error(logits(model), wanted) < 1e-12


@pytest.mark.needs("transformers>=5")  # earlier releases tie the output layer alone by the setting
def test_a_trained_copy_of_one_of_several_tied_weights_is_not_folded() -> None:
    with pytest.warns(hra_fx.HRAWarning, match=r"lm_head\.weight are tied, and adapter"):
        model = transformed(tiny.t5(), "q", modules_to_save=["lm_head"])
    text = r"ForConditionalGeneration: a trained copy of one of several tied weights cannot be folded, because config"
    with refuses(model, text, hra_fx.FoldError):
        hra_fx.fold(model)


def test_a_model_with_adapters_is_not_resized() -> None:
    model = transformed(LLAMA(), "lm_head")
    with refuses(model, "^LlamaForCausalLM: resize_token_embeddings would replace adapted layers"):
        model.resize_token_embeddings(40)
