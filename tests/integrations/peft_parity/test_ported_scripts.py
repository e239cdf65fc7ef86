"""Scripts that were written for PEFT, with `get_peft_model` replaced: each computes what it computed with PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft_sides import F64, by_peft, by_us, opened_by_peft, peft_warnings_ignored, randomise, saved_by_peft
from tiny_models import batch, bert, llama, tokens_of
from torch import Tensor, nn

import hra_fx

pytestmark = [
    # PEFT asks transformers for it, wherever it opens an adapter.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

CLASSES: dict[str, Any] = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
# In float64; but the norms of Llama compute in float32, and AdamW magnifies rounding where a gradient vanishes.
TIGHT = 1e-6
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=batch(kind)["input_ids"]).logits
    return found


def test_a_language_model_with_a_reflected_head_is_trained_and_generates(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=False).double()
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"], "task_type": "CAUSAL_LM"}
    data, prompt = batch("llama"), {"input_ids": tokens_of(3, 5, seed=4)}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    said, models = {}, {}
    for name, model in (("theirs", by_peft(base, **fields)), ("ours", by_us(base, **fields))):
        randomise(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for _ in range(4):
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()
        model.eval()
        said[name] = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        models[name] = model
    wanted = logits(models["theirs"], "llama")
    assert relative_error(logits(models["ours"], "llama"), wanted) < TIGHT
    assert torch.equal(said["ours"], said["theirs"])
    assert said["ours"].shape == (3, 13)
    assert not torch.equal(said["ours"], base.eval().generate(**prompt, max_new_tokens=8, do_sample=False))

    models["ours"].save_pretrained(tmp_path / "ours")
    saved_by_peft(models["theirs"], tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        opened = hra_fx.HRAModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
        assert torch.equal(opened.generate(**prompt, max_new_tokens=8, do_sample=False), said["theirs"])
        assert relative_error(logits(opened, "llama"), wanted) < TIGHT
        assert relative_error(logits(opened_by_peft(base, tmp_path / folder), "llama"), wanted) < TIGHT
    folded = models["ours"].merge_and_unload()
    assert torch.equal(folded.generate(**prompt, max_new_tokens=8, do_sample=False), said["theirs"])


def randomise_all(model: Any, names: Iterable[str]) -> None:
    """The same random values on both sides, adapter by adapter."""
    for seed, name in enumerate(names):
        model.set_adapter(name)
        randomise_adapter(model, name, seed)


def randomise_adapter(model: nn.Module, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Names end alike on both sides, and the head's parameters are the only others.
    vectors = sorted((key.split("bert.", 1)[1], p) for key, p in model.named_parameters() if key.endswith(f".{name}"))
    with torch.no_grad():
        for _, parameter in vectors:
            parameter.copy_(torch.randn(parameter.shape, dtype=F64, generator=generator))


def test_several_adapters_are_trained_in_turn_by_one_optimizer(tmp_path: Path) -> None:
    base = bert(**WITHOUT_DROPOUT).double()
    first, second = CLASSES | {"target_modules": ["query"]}, CLASSES | {"r": 2, "target_modules": ["value"]}
    with peft_warnings_ignored():
        theirs = by_peft(base, "a", **first)
        theirs.add_adapter("b", peft.HRAConfig(**second))
        theirs = theirs.double()
    ours = by_us(base, "a", **first)
    ours.add_adapter("b", hra_fx.HRAConfig(**second))
    data = {**batch("bert"), "labels": torch.tensor([0, 1, 1, 0])}
    found: dict[str, dict[str, Tensor]] = {}
    for side, model in (("theirs", theirs), ("ours", ours)):
        randomise_all(model, "ab")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        model.train()
        for name in ("a", "b", "b", "a", "b"):
            model.set_adapter(name)
            other = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
            for _ in range(2):
                optimizer.zero_grad()
                model(**data).loss.backward()
                optimizer.step()
            for key, parameter in model.named_parameters():
                assert key not in other or torch.equal(parameter, other[key]), (side, name, key)
        found[side] = {}
        for name in "ab":
            model.set_adapter(name)
            found[side][name] = logits(model, "bert")
        with model.disable_adapter():
            assert torch.equal(logits(model, "bert"), logits(base, "bert")), side
    for name in "ab":
        assert relative_error(found["ours"][name], found["theirs"][name]) < TIGHT, name
    assert relative_error(found["ours"]["a"], found["ours"]["b"]) > 1e-3

    ours.save_pretrained(tmp_path)
    for name in "ab":
        assert relative_error(logits(opened_by_peft(base, tmp_path / name), "bert"), found["theirs"][name]) < TIGHT
    opened = hra_fx.HRAModel.from_pretrained(copy.deepcopy(base), tmp_path, "a", subfolder="a")
    opened.load_adapter(tmp_path, "b", subfolder="b")
    for name in "ab":
        opened.set_adapter(name)
        assert torch.equal(logits(opened, "bert"), found["ours"][name])
