"""`resize_token_embeddings` under an adapter on the output layer: other tokens, the same vectors."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.transformers_use.tied import CASES, VOCABULARY, Case, case, logits, stored
from oracles import dense_q, dense_weight, relative_error
from tiny_models import turn
from torch import Tensor, nn
from transformers import MobileBertConfig, MobileBertForMaskedLM

import hra_fx

#: Every architecture, tied; an encoder-decoder of two models cannot be resized.
EVERY = [(kind, True) for kind in CASES if kind != "bert_to_bert"] + [("llama", False), ("bert", False)]
every = pytest.mark.parametrize(("kind", "tied"), EVERY)
few = pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("bert", False)])
ties = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
sizes = pytest.mark.parametrize("size", [VOCABULARY + 8, VOCABULARY - 8])


def base(kind: str, *, tied: bool) -> Case:
    made = case(kind)
    if not tied:
        made.model.config.tie_word_embeddings = False
        head = made.model.get_submodule(made.head)
        generator = torch.Generator().manual_seed(3)
        head.weight = nn.Parameter(torch.randn(head.weight.shape, dtype=torch.float64, generator=generator))
    return made


def adapted(kind: str, *, tied: bool = True, shape: Any = hra_fx.transform, **fields: Any) -> Case:
    made = base(kind, tied=tied)
    config = hra_fx.HRAConfig(**{"r": 3, "target_modules": [made.head, made.inside], **fields})
    model = shape(made.model, config)
    turn(model)
    return made._replace(model=model)


def resize(model: Any, size: int) -> None:
    model.resize_token_embeddings(size, mean_resizing=False)


def kept(found: Tensor, size: int) -> Tensor:
    return found[..., : min(size, VOCABULARY)]


@every
@sizes
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


@few
def test_an_optimizer_from_before_trains_on_and_a_frozen_adapter_stays_frozen(kind: str, tied: bool) -> None:
    made = adapted(kind, tied=tied)
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    resize(made.model, VOCABULARY + 8)
    vectors = made.model.get_submodule(made.head).hra_u["default"]
    start = vectors.detach().clone()
    logits(made.model.train()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(vectors, start)
    model = adapted(kind, tied=tied, inference_mode=True).model
    resize(model, VOCABULARY + 8)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@few
def test_the_adapter_is_saved_and_loaded_over_either_size(kind: str, tied: bool, tmp_path: Path) -> None:
    plain = adapted(kind, tied=tied).model
    before = logits(plain)
    smaller = base(kind, tied=tied).model
    resize(plain, VOCABULARY + 8)
    plain.save_pretrained(tmp_path)
    wanted = logits(plain)
    hra_fx.load_adapter(smaller, tmp_path)
    assert relative_error(logits(smaller), before) < 1e-12
    hra_fx.delete_adapter(plain, "default")
    hra_fx.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), wanted)


@ties
def test_all_adapters_come_along_and_can_be_switched(tied: bool) -> None:
    made = adapted("llama", tied=tied, shape=hra_fx.HRAModel)
    model = made.model
    model.add_adapter("second", hra_fx.HRAConfig(r=2, target_modules=["lm_head"], apply_GS=True))
    turn(model, 9)
    hra_fx.set_scale(model, "second", 0.5)
    wanted = {}
    for names in ("default", "second", ["default", "second"]):
        model.set_adapter(names)
        wanted[str(names)] = logits(model)
    with model.disable_adapter():
        off = logits(model)
    resize(model, VOCABULARY + 8)
    assert model.active_adapters == ["default", "second"]
    for names in (["default", "second"], "second", "default"):
        model.set_adapter(names)
        assert relative_error(kept(logits(model), VOCABULARY), wanted[str(names)]) < 1e-12
    assert not model.lm_head.hra_u["second"].requires_grad
    with model.disable_adapter():
        assert relative_error(kept(logits(model), VOCABULARY), off) < 1e-12
    model.delete_adapter("second")
    assert list(model.lm_head.hra_u) == ["default"]
    plain = model.unload()
    assert type(plain.lm_head) is nn.Linear
    assert relative_error(kept(logits(plain), VOCABULARY), off) < 1e-12


def test_new_tokens_are_the_mean_of_the_old_ones_unless_told_otherwise() -> None:
    model = adapted("llama", tied=False).model
    wanted = logits(model)
    model.resize_token_embeddings(VOCABULARY + 8)
    assert relative_error(kept(logits(model), VOCABULARY), wanted) < 1e-12
    assert relative_error(logits(model)[..., -1], wanted.mean(dim=-1)) < 1e-3


def test_a_multiple_is_padded_to_and_no_size_asks_only() -> None:
    model = adapted("llama", tied=False).model
    wanted = logits(model)
    assert model.resize_token_embeddings() is model.model.embed_tokens
    assert torch.equal(logits(model), wanted)
    model.resize_token_embeddings(33, pad_to_multiple_of=8, mean_resizing=False)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 40
    assert relative_error(kept(logits(model), VOCABULARY), wanted) < 1e-12


def test_a_resize_that_transformers_refuses_changes_nothing() -> None:
    model = adapted("bert_to_bert").model
    wanted, kinds_of = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(NotImplementedError):
        model.resize_token_embeddings(VOCABULARY + 8)
    assert [type(module) for module in model.modules()] == kinds_of
    assert torch.equal(logits(model), wanted)


# Refusals


def refused(model: Any, text: str) -> None:
    wanted = logits(model)
    with pytest.raises(hra_fx.AdapterError, match=text):
        resize(model, VOCABULARY + 8)
    assert torch.equal(logits(model), wanted)
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY


@pytest.mark.parametrize(
    ("kind", "fields", "path"),
    [
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ("llama", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}, r"model\.embed_tokens"),
        ("bert", {"target_modules": ["query"], "bias": "all"}, r"cls\.predictions\.decoder"),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["decoder.embed_tokens"]}, r"decoder\.embed_tokens"),
    ],
)
def test_trained_copies_are_not_resized(kind: str, fields: dict[str, Any], path: str) -> None:
    refused(
        adapted(kind, **fields).model,
        rf"^{path}: an adapter has a trained copy of it \(modules_to_save or bias\), which resize_token_embeddings "
        r"does not resize\. Resize before hra_fx\.transform, or fold or unload first\.$",
    )


def test_a_merged_head_must_be_unmerged_first() -> None:
    model = adapted("llama", tied=False).model
    wanted = logits(model)
    hra_fx.merge_adapter(model)
    refused(
        model,
        r"^lm_head: an adapter is merged into it, and its stored base weight has the old number of tokens\. Call "
        r"hra_fx\.unmerge_adapter, resize, and merge again\.$",
    )
    hra_fx.unmerge_adapter(model)
    resize(model, VOCABULARY + 8)
    hra_fx.merge_adapter(model)
    assert relative_error(kept(logits(model), VOCABULARY), wanted) < 1e-12
    # Layers that are merged elsewhere do not matter.
    model = adapted("llama", tied=False, target_modules=["q_proj"]).model
    wanted = logits(model)
    hra_fx.merge_adapter(model)
    resize(model, VOCABULARY + 8)
    hra_fx.unmerge_adapter(model)
    assert relative_error(kept(logits(model), VOCABULARY), wanted) < 1e-12


def mobilebert(*targets: str) -> Any:
    """A model that resizes a layer of its own besides, and reads the weight of its output layer without a call."""
    torch.manual_seed(0)
    sizes_of = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "intermediate_size": 24}
    settings = MobileBertConfig(vocab_size=VOCABULARY, num_hidden_layers=1, num_attention_heads=2, **sizes_of)
    model = MobileBertForMaskedLM(settings).to(torch.float64).eval()
    hra_fx.transform(model, hra_fx.HRAConfig(r=3, target_modules=[*targets]))
    turn(model)
    return model


def test_reflections_over_the_tokens_themselves_are_refused() -> None:
    refused(
        mobilebert("cls.predictions.dense"),
        r"^cls\.predictions\.dense: its vectors have length 32, the number of tokens, and would not fit after "
        r"resize_token_embeddings\. Resize before hra_fx\.transform, or fold or unload first\.$",
    )


@sizes
def test_an_output_layer_whose_weight_is_reflected_for_its_reader(size: int) -> None:
    model = mobilebert("cls.predictions.decoder", "query")
    wanted, head = logits(model), model.cls.predictions.decoder
    model.resize_token_embeddings(size)
    assert model.cls.predictions.decoder.hra_u is head.hra_u
    assert relative_error(kept(logits(model), size), kept(wanted, size)) < 1e-12
    moved = logits(model)
    with pytest.warns(hra_fx.HRAWarning, match="^untied: "):
        hra_fx.fold(model)
    assert relative_error(logits(model), moved) < 1e-12
