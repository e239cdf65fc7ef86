"""PEFT also writes the base model's embeddings into the file of an adapter. They are named in a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from integrations.transformers_use import tied
from model.many import refuses
from oracles import relative_error
from peft_sides import by_peft, by_us, opened_by_peft, randomise, same_line, saved_by_peft
from safetensors.torch import load_file
from tiny_models import inputs, tiny
from torch import Tensor

import hra_fx

HEAD: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
BODY: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
OTHERS: dict[str, Any] = {"r": 2, "target_modules": ["query", "q"]}
ASKED = {"save_embedding_layers": True}
#: A model, its adapter, options of PEFT's `save_pretrained`, and the embeddings that it may write.
FILES = {
    "the head is a target": ("llama", HEAD, {}, {"lm_head.base_layer.weight", "model.embed_tokens.weight"}),
    "asked for": ("llama", BODY, ASKED, {"lm_head.weight", "model.embed_tokens.weight"}),
    "asked for, bert": ("bert, classes", OTHERS, ASKED, {"bert.embeddings.word_embeddings.weight"}),
    "asked for, t5": ("t5", OTHERS, ASKED, {"shared.weight", "lm_head.weight"}),
}


def logits(model: Any) -> Tensor:
    found: Tensor = model(**inputs(model)).logits.detach()
    return found


def embeddings_in(folder: Path) -> set[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.") for key in keys if key.endswith(".weight")}


def written(folder: Path, fields: dict[str, Any], options: dict[str, Any], base: Any) -> Any:
    """PEFT's model, saved into the folder."""
    theirs = by_peft(base, **fields, init_weights=False)
    randomise(theirs)
    saved_by_peft(theirs, folder, **options)
    return theirs.eval()


@pytest.mark.parametrize(("kind", "fields", "options", "besides"), FILES.values(), ids=FILES)
def test_embeddings_in_a_file_of_peft_are_not_loaded_and_named(
    kind: str, fields: dict[str, Any], options: dict[str, Any], besides: set[str], tmp_path: Path
) -> None:
    base = tiny(kind)
    theirs = written(tmp_path, fields, options, base)
    assert embeddings_in(tmp_path) <= besides
    assert embeddings_in(tmp_path) != set()
    message = (
        r"\.weight are copies of the base model's embeddings, which are not loaded\. Make sure that this model has"
    )
    with pytest.warns(hra_fx.HRAWarning, match=message) as caught:
        ours = hra_fx.HRAModel.from_pretrained(tiny(kind), tmp_path)
    assert len(caught) == 1
    assert relative_error(logits(ours), logits(theirs)) < 1e-9
    assert relative_error(logits(ours), logits(base)) > 1e-3


def test_our_files_hold_no_embeddings_also_if_the_head_is_reflected(tmp_path: Path) -> None:
    ours = by_us(tiny("llama"), **HEAD, init_weights=False)
    message = "save_embedding_layers=True is not supported: name the embeddings in modules_to_save."
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(message)}$"):
        ours.save_pretrained(tmp_path, save_embedding_layers=True)
    assert list(tmp_path.iterdir()) == []
    for value in ("auto", False):
        ours.save_pretrained(tmp_path / str(value), save_embedding_layers=value)
        assert embeddings_in(tmp_path / str(value)) == set()
        theirs = opened_by_peft(tiny("llama"), tmp_path / str(value))
        assert relative_error(logits(theirs), logits(ours)) < 1e-9


BOTH: dict[str, Any] = {**BODY, "modules_to_save": ["embed_tokens", "lm_head"]}


def trained_apart(base: Any) -> Any:
    """PEFT's model of tied embeddings, of which it trains two copies."""
    theirs = by_peft(base, **BOTH, init_weights=False)
    randomise(theirs)
    return theirs.eval()


def test_a_head_tied_to_the_embedding_counts_once() -> None:
    base = tied.case("llama").model
    same_line(by_peft(base, **BODY), by_us(base, **BODY))


def test_two_trained_copies_of_tied_embeddings_stay_two(tmp_path: Path) -> None:
    theirs = trained_apart(tied.case("llama").model)
    wanted = tied.logits(theirs)
    saved_by_peft(theirs, tmp_path / "theirs")
    ours = hra_fx.load_adapter(tied.case("llama").model, tmp_path / "theirs")
    for model in (ours, hra_fx.from_peft(theirs)):
        assert relative_error(tied.logits(model), wanted) < 1e-6  # PEFT computes in float32
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        model.tie_weights()
        assert relative_error(tied.logits(model), wanted) < 1e-6
    hra_fx.save_adapter(ours, tmp_path / "ours")
    again = hra_fx.load_adapter(tied.case("llama").model, tmp_path / "ours")
    assert relative_error(tied.logits(again), wanted) < 1e-6
    with pytest.warns(hra_fx.HRAWarning, match="^a trained copy of a tied weight"):
        hra_fx.fold(again)
    assert relative_error(tied.logits(again), wanted) < 1e-6
    hra_fx.delete_adapter(ours, "default")
    assert ours.config.tie_word_embeddings


def test_two_trained_copies_do_not_load_into_one(tmp_path: Path) -> None:
    saved_by_peft(trained_apart(tied.case("llama").model), tmp_path)
    model = hra_fx.transform(tied.case("llama").model, hra_fx.HRAConfig(**BOTH, init_weights=False))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with refuses(model, "or tied weights than in the file"):
        hra_fx.load_adapter(model, tmp_path, "default")
