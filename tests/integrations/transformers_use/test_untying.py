"""An adapter on an output layer that transformers ties to the embeddings: folded, saved, loaded and tied again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.transformers_use.tied import CASES, Case, case, logits, stored
from model.many import seen
from oracles import dense_q, dense_weight, relative_error
from tiny_models import turn
from transformers import LlamaForCausalLM

import hra_fx

kinds = pytest.mark.parametrize("kind", CASES)
few = pytest.mark.parametrize("kind", ["llama", "bart", "bert_to_bert"])


def adapted(kind: str, *targets: str, shape: Any = hra_fx.transform, **fields: Any) -> Case:
    made = case(kind)
    chosen = [*targets] or [made.head, made.inside]
    model = shape(made.model, hra_fx.HRAConfig(r=3, target_modules=chosen, **fields))
    turn(model)
    return made._replace(model=model)


def folded(model: Any) -> str:
    """Fold; the message of the warning."""
    with pytest.warns(hra_fx.HRAWarning) as caught:
        hra_fx.fold(model)
    assert len(caught) == 1
    return str(caught[0].message)


def loaded(model: Any, folder: Path) -> Any:
    """What transformers reads from what it writes; nothing in it is new or left over."""
    model.save_pretrained(folder)
    other, told = type(model).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(told.values()), told
    return other.eval()


@kinds
def test_a_fold_unties_the_head_and_a_saved_model_loads_equal(kind: str, tmp_path: Path) -> None:
    model, head, embedding, _ = adapted(kind)
    keys = list(case(kind).model.state_dict())
    wanted, before = logits(model), model.get_submodule(embedding).weight.detach().clone()
    layer: Any = model.get_submodule(head)
    q = dense_q(layer.hra_u["default"].detach(), anchor=layer.hra_u.anchor("default"))
    weight = dense_weight(stored(layer).detach(), q)
    text = folded(model)
    assert text.startswith(f"untied: {head} (from {embedding}.weight")
    assert "config.tie_word_embeddings is now False." in text
    assert relative_error(model.get_submodule(head).weight, weight) < 1e-12
    assert torch.equal(model.get_submodule(embedding).weight, before)
    assert relative_error(logits(model), wanted) < 1e-12
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = loaded(model, tmp_path)
    assert relative_error(logits(other), wanted) < 1e-12
    if kind != "t5":  # its config class ties again, see below
        other.tie_weights()
        assert relative_error(logits(other), wanted) < 1e-12
    model.tie_weights()
    assert relative_error(logits(model), wanted) < 1e-12


def test_a_class_that_ties_again_is_named_in_the_warning(tmp_path: Path) -> None:
    model = adapted("t5").model
    wanted = logits(model)
    assert "T5Config turns it on again when it is loaded: set it to False right after from_pretrained." in folded(model)
    other = loaded(model, tmp_path)
    other.config.tie_word_embeddings = False
    other.tie_weights()
    assert relative_error(logits(other), wanted) < 1e-12


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        ("llama", ""),
        ("bart", "model.decoder.embed_tokens.weight, model.encoder.embed_tokens.weight"),
        ("bert", "cls.predictions.decoder.bias"),
        ("bert_to_bert", "decoder.cls.predictions.decoder.bias"),
    ],
)
def test_what_the_same_setting_tied_is_parted_and_named(kind: str, also: str) -> None:
    made = adapted(kind)
    text = folded(made.model)
    assert (
        (f"The same setting tied {also}, which are untied as well." in text) if also else ("same setting" not in text)
    )
    pointers = [parameter.data_ptr() for parameter in made.model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_the_setting_of_what_is_untied_changes_and_no_other() -> None:
    model = adapted("llava").model
    assert model.config.tie_word_embeddings and model.config.text_config.tie_word_embeddings
    folded(model)
    assert not model.config.tie_word_embeddings and not model.config.text_config.tie_word_embeddings
    model = adapted("bert_to_bert").model
    folded(model)
    assert not model.config.decoder.tie_word_embeddings
    assert model.config.encoder.tie_word_embeddings


@few
def test_merge_and_unload_unties_and_unload_does_not(kind: str, tmp_path: Path) -> None:
    model = adapted(kind, shape=hra_fx.HRAModel).model
    wanted = logits(model)
    with pytest.warns(hra_fx.HRAWarning, match="^untied: "):
        plain = model.merge_and_unload()
    assert type(plain) is type(case(kind).model)
    assert relative_error(logits(loaded(plain, tmp_path)), wanted) < 1e-12
    made = adapted(kind, shape=hra_fx.HRAModel)
    plain = made.model.unload()
    assert plain.get_submodule(made.head).weight is plain.get_submodule(made.embedding).weight
    assert torch.equal(logits(plain), logits(case(kind).model))


# With trained copies


def test_a_trained_head_inside_another_model_survives_tie_weights_and_ties_again_when_it_goes() -> None:
    made = adapted("bert_to_bert", "query", modules_to_save=["decoder.cls.predictions.decoder"])
    model, config = made.model, made.model.config
    assert (config.encoder.tie_word_embeddings, config.decoder.tie_word_embeddings) == (True, False)
    with torch.no_grad():
        model.get_submodule(made.head).weight.add_(1.0)
    wanted = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), wanted)
    hra_fx.delete_adapter(model, "default")
    assert config.decoder.tie_word_embeddings
    assert model.get_submodule(made.head).weight is model.get_submodule(made.embedding).weight


# Where a forward asks


def test_a_model_whose_forward_asks_for_the_tie_is_not_folded() -> None:
    model, head, embedding, _ = adapted("switch")
    wanted = logits(model)
    text = (
        r"^the model \(SwitchTransformersForConditionalGeneration\): its forward depends on "
        r"config\.tie_word_embeddings, so its output layer cannot be untied from the embeddings\. Leave it out with "
        r"exclude_modules\.$"
    )
    with pytest.raises(hra_fx.FoldError, match=text):
        hra_fx.fold(model)
    assert torch.equal(logits(model), wanted)
    assert stored(model.get_submodule(head)) is model.get_submodule(embedding).weight


class AsksInAMethod(LlamaForCausalLM):
    @property
    def scale(self) -> float:
        return 0.5 if self.config.tie_word_embeddings else 1.0

    def forward(self, *args: Any, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        output.logits = output.logits * self.scale
        return output


def test_it_may_ask_in_a_method() -> None:
    model = AsksInAMethod(case("llama").model.config).double().eval()
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["lm_head"], init_weights=False))
    wanted = logits(model)
    with pytest.raises(hra_fx.FoldError, match=r"its forward depends on config\.tie_word_embeddings"):
        hra_fx.fold(model)
    assert torch.equal(logits(model), wanted)


def test_such_a_model_takes_no_trained_copy_of_its_head() -> None:
    model = case("switch").model
    before = seen(model)
    config = hra_fx.HRAConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"])
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"its forward depends on .* modules_to_save\.$"):
        hra_fx.transform(model, config)
    assert seen(model) == before
