"""PEFT also writes the base model's embeddings into the file of an adapter; and it trains two copies of tied ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama
from model.many import refuses
from oracles import relative_error
from peft_sides import by_peft, by_us, opened_by_peft, randomise, same_line, saved_by_peft
from safetensors.torch import load_file
from tiny_models import inputs, tiny
from torch import Tensor

import hra_fx

HEAD: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}


def tied() -> Any:
    return llama(tie_word_embeddings=True).double().eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits.detach()
    return found


@pytest.mark.parametrize(
    ("kind", "fields", "options"),
    [("llama", HEAD, {}), ("t5", {"r": 2, "target_modules": ["q"]}, {"save_embedding_layers": True})],
    ids=["the head is a target", "asked for"],
)
def test_embeddings_in_a_file_of_peft_are_named_and_not_loaded_and_ours_have_none(
    kind: str, fields: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = by_peft(tiny(kind), **fields, init_weights=False).eval()
    randomise(theirs)
    saved_by_peft(theirs, tmp_path / "theirs", **options)
    text = r"\.weight are copies of the base model's embeddings, which are not loaded\. Make sure that this model has"
    with pytest.warns(hra_fx.HRAWarning, match=text) as caught:
        ours = hra_fx.HRAModel.from_pretrained(tiny(kind), tmp_path / "theirs")
    assert len(caught) == 1
    assert relative_error(logits(ours), logits(theirs)) < 1e-9
    assert relative_error(logits(ours), logits(tiny(kind))) > 1e-3
    text = r"^save_embedding_layers=True is not supported: name the embeddings in modules_to_save\.$"
    with pytest.raises(hra_fx.AdapterError, match=text):
        ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    assert all(key.endswith(".hra_u") for key in load_file(tmp_path / "ours" / "adapter_model.safetensors"))
    assert relative_error(logits(opened_by_peft(tiny(kind), tmp_path / "ours")), logits(ours)) < 1e-9


def test_a_head_tied_to_the_embedding_counts_once() -> None:
    base = tied()
    same_line(by_peft(base, r=2, target_modules=["q_proj"]), by_us(base, r=2, target_modules=["q_proj"]))


def test_two_trained_copies_of_tied_embeddings_stay_two(tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = by_peft(tied(), **fields, task_type="CAUSAL_LM", init_weights=False).eval()
    randomise(theirs)
    wanted = logits(theirs)
    saved_by_peft(theirs, tmp_path / "theirs")
    ours = hra_fx.load_adapter(tied(), tmp_path / "theirs")
    for model in (ours, hra_fx.from_peft(theirs)):
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        model.tie_weights()
        assert relative_error(logits(model), wanted) < 1e-6  # PEFT computes in float32
    hra_fx.save_adapter(ours, tmp_path / "ours")
    again = hra_fx.load_adapter(tied(), tmp_path / "ours")
    with pytest.warns(hra_fx.HRAWarning, match="^a trained copy of a tied weight"):
        hra_fx.fold(again)
    assert relative_error(logits(again), wanted) < 1e-6
    hra_fx.delete_adapter(ours, "default")
    assert ours.config.tie_word_embeddings

    model = hra_fx.transform(tied(), hra_fx.HRAConfig(**fields, init_weights=False))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with refuses(model, "or tied weights than in the file"):
        hra_fx.load_adapter(model, tmp_path / "theirs", "default")
