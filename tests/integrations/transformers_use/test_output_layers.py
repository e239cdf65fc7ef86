"""An adapter on an output layer that transformers ties to the embeddings: folded, saved, tied again, resized."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from integrations.transformers_use.tied import CASES, VOCABULARY, Case, case, logits, stored
from model.many import refuses
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import hra_fx

#: In transformers 4, the forward of T5 asks whether its output layer is tied.
_NEEDS = {"t5": pytest.mark.needs("transformers>=5.6")}
kinds = pytest.mark.parametrize("kind", [pytest.param(kind, marks=_NEEDS.get(kind, ())) for kind in CASES])


def base(kind: str, *, tied: bool) -> Case:
    made = case(kind)
    if not tied:
        made.model.config.tie_word_embeddings = False
        head = made.model.get_submodule(made.head)
        generator = torch.Generator().manual_seed(3)
        head.weight = nn.Parameter(torch.randn(head.weight.shape, dtype=torch.float64, generator=generator))
    return made


def adapted(kind: str, *targets: str, tied: bool = True, shape: Any = hra_fx.transform, **fields: Any) -> Case:
    made = base(kind, tied=tied)
    config = hra_fx.HRAConfig(**{"r": 3, "target_modules": [*targets] or [made.head, made.inside], **fields})
    model = shape(made.model, config)
    randomise(model)
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
    again = "T5Config turns it on again when it is loaded: set it to False right after from_pretrained."
    assert (again in text) is (kind == "t5")
    if kind == "t5":
        other.config.tie_word_embeddings = False
    other.tie_weights()
    assert relative_error(logits(other), wanted) < 1e-12
    model.tie_weights()
    assert relative_error(logits(model), wanted) < 1e-12


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        ("llama", ""),
        ("llava", ""),
        ("bart", "model.decoder.embed_tokens.weight, model.encoder.embed_tokens.weight"),
        ("bert_to_bert", "decoder.cls.predictions.decoder.bias"),
    ],
)
def test_what_the_same_setting_tied_is_parted_and_named(kind: str, also: str) -> None:
    model = adapted(kind).model
    parts = {"llava": ("", "text_config"), "bert_to_bert": ("decoder",)}.get(kind, ("",))
    settings = [getattr(model.config, part) if part else model.config for part in parts]
    assert all(one.tie_word_embeddings for one in settings)
    text = folded(model)
    assert ("The same setting tied" in text) is bool(also)
    assert f"tied {also}, which are untied as well." in text or not also
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not any(one.tie_word_embeddings for one in settings)
    assert kind != "bert_to_bert" or model.config.encoder.tie_word_embeddings


# Where a forward asks


def test_a_model_whose_forward_asks_for_the_tie_is_not_folded_and_takes_no_copy_of_its_head() -> None:
    model = adapted("switch").model
    text = (
        r"^the model \(SwitchTransformersForConditionalGeneration\): its forward depends on "
        r"config\.tie_word_embeddings, so its output layer cannot be untied from the embeddings\. Leave it out with "
        r"exclude_modules\.$"
    )
    with refuses(model, text, hra_fx.FoldError):
        hra_fx.fold(model)
    model = case("switch").model
    config = hra_fx.HRAConfig(r=2, target_modules=["q"], modules_to_save=["lm_head"])
    with refuses(model, r"its forward depends on .* modules_to_save\.$", hra_fx.UnsupportedLayerError):
        hra_fx.transform(model, config)


class AsksInAMethod(LlamaForCausalLM):
    @property
    def scale(self) -> float:
        return 0.5 if self.config.tie_word_embeddings else 1.0

    def forward(self, *args: Any, **inputs: Any) -> Any:
        output = super().forward(*args, **inputs)
        output.logits = output.logits * self.scale
        return output


def test_it_may_ask_in_a_method() -> None:
    model = AsksInAMethod(case("llama").model.config)
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["lm_head"], init_weights=False))
    with pytest.raises(hra_fx.FoldError, match=r"its forward depends on config\.tie_word_embeddings"):
        hra_fx.fold(model)


#: Every architecture, tied; an encoder-decoder of two models cannot be resized.
EVERY = [(kind, True, VOCABULARY + 8) for kind in CASES if kind != "bert_to_bert"]
EVERY += [("llama", False, VOCABULARY - 8), ("bert", False, VOCABULARY + 8), ("bert", True, VOCABULARY - 8)]


def resize(model: Any, size: int) -> None:
    model.resize_token_embeddings(size, mean_resizing=False)


def kept(found: Tensor, size: int) -> Tensor:
    return found[..., : min(size, VOCABULARY)]


@pytest.mark.parametrize(
    ("kind", "tied", "size"), [pytest.param(*each, marks=_NEEDS.get(each[0], ())) for each in EVERY]
)
def test_old_tokens_come_out_as_before_and_new_ones_are_rotated_too(kind: str, tied: bool, size: int) -> None:
    made = adapted(kind, tied=tied)
    model, before = made.model, made.model.get_submodule(made.head)
    reflection, vectors, anchor = before.hra_u, before.hra_u["default"], before.hra_u.anchor("default")
    wanted, names, keys = logits(model), [name for name, _ in model.named_parameters()], list(model.state_dict())
    resize(model, size)
    head = model.get_submodule(made.head)
    assert logits(model).shape[-1] == head.weight.shape[0] == size
    assert relative_error(kept(logits(model), size), kept(wanted, size)) < 1e-12
    assert head.hra_u is reflection
    assert head.hra_u["default"] is vectors
    assert head.hra_u.anchor("default") is anchor
    assert (head is before) is tied
    assert (stored(head) is stored(model.get_submodule(made.embedding))) is tied
    assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == (names, keys)
    assert all(p.requires_grad is (".hra_u." in name) for name, p in model.named_parameters())
    assert not any(module.training for module in model.modules())
    if kind == "bert":  # another module holds the bias too
        assert head.bias is model.cls.predictions.bias
        assert head.bias.shape == (size,)

    wanted, weight = logits(model), dense_weight(stored(head).detach(), dense_q(vectors.detach(), anchor=anchor))
    with pytest.warns(hra_fx.HRAWarning, match="^untied: ") if tied else nullcontext():
        hra_fx.fold(model)
    assert relative_error(model.get_submodule(made.head).weight, weight) < 1e-12
    assert relative_error(logits(model), wanted) < 1e-12
    assert type(model.get_submodule(made.head)) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_adapter_stays_frozen_when_the_embeddings_are_resized() -> None:
    model = adapted("llama", inference_mode=True).model
    resize(model, VOCABULARY + 8)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Refusals


@pytest.mark.parametrize(
    ("kind", "fields", "path"),
    [
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ("bert", {"target_modules": ["query"], "bias": "all"}, r"cls\.predictions\.decoder"),
    ],
)
def test_trained_copies_are_not_resized(kind: str, fields: dict[str, Any], path: str) -> None:
    model = adapted(kind, **fields).model
    text = (
        rf"^{path}: an adapter has a trained copy of it \(modules_to_save or bias\), which "
        r"resize_token_embeddings does not resize\. Resize before hra_fx\.transform, or fold or unload first\.$"
    )
    with refuses(model, text):
        resize(model, VOCABULARY + 8)


def test_a_merged_head_must_be_unmerged_first() -> None:
    model = adapted("llama", tied=False).model
    wanted = logits(model)
    hra_fx.merge_adapter(model)
    text = (
        r"^lm_head: an adapter is merged into it, and its stored base weight has the old number of tokens\. Call "
        r"hra_fx\.unmerge_adapter, resize, and merge again\.$"
    )
    with refuses(model, text):
        resize(model, VOCABULARY + 8)
    hra_fx.unmerge_adapter(model)
    resize(model, VOCABULARY + 8)
    hra_fx.merge_adapter(model)
    assert relative_error(kept(logits(model), VOCABULARY), wanted) < 1e-12
