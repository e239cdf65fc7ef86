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
    """A model that also resizes a layer below its output layer."""
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
