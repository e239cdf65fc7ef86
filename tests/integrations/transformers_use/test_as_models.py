"""To transformers an adapted model is what it was: its class and attributes, generation and pipelines."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from integrations.trl_use.runs import base_model
from tiny import llama, untied_t5 as t5
from tiny_models import BASES, SHAPES, adapted, config_for, pairs, rotated, tokens_of
from tiny_tokenizer import QUESTION, tokenizer
from torch import Tensor
from transformers import BertForSequenceClassification, LlamaForCausalLM, pipeline
from transformers.utils import find_labels

import hra_fx

CLASSES = {"bert": BertForSequenceClassification, "llama": LlamaForCausalLM}


@pairs
def test_it_is_its_class_with_its_name_attributes_and_signature(kind: str, shape: str, tmp_path: Path) -> None:
    base, plain = BASES[kind](), BASES[kind]()
    base.save_pretrained(tmp_path)
    embeddings, head, settings = base.get_input_embeddings(), base.get_output_embeddings(), base.config
    model = adapted(kind, shape, base=base)
    assert isinstance(model, CLASSES[kind])
    assert isinstance(model, hra_fx.HRAModel) is (shape == "HRAModel")
    assert model is base
    assert model.config is settings
    assert model.dtype == torch.float32
    assert adapted(kind, shape, base=BASES[kind]().bfloat16()).dtype == torch.bfloat16
    assert model.get_input_embeddings() is embeddings
    assert model.get_output_embeddings() is head
    # The Trainer reads the names of arguments.
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert find_labels(type(model)) == find_labels(CLASSES[kind]) == ["labels"]
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert type(loaded) is type(plain)
        assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))


PROMPT = tokens_of(2, 6)
LENGTH = {"max_new_tokens": 10, "min_new_tokens": 10}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "a static cache": {"do_sample": False, "cache_implementation": "static"},
}
T5_TARGETS = ["q", "v", "wi", "wo"]


def say(model: Any, prompt: Tensor = PROMPT, **way: Any) -> Tensor:
    torch.manual_seed(11)
    said: Tensor = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **(LENGTH | way))
    return said


EVERY = [("llama", "transform", way) for way in WAYS] + [("t5", "HRAModel", "beams")]


@pytest.mark.parametrize(("kind", "shape", "way"), EVERY)
def test_a_model_generates_as_with_the_rotated_weights(kind: str, shape: str, way: str) -> None:
    # In float64, so that no rounding decides which token is the best.
    base = (llama() if kind == "llama" else t5()).double().eval()
    targets = {"target_modules": T5_TARGETS, "task_type": "SEQ_2_SEQ_LM"} if kind == "t5" else {}
    model = SHAPES[shape](copy.deepcopy(base), config_for("llama", **targets))
    randomise(model)
    said = say(model, **WAYS[way])
    assert torch.equal(said, say(rotated(base, model), **WAYS[way]))
    assert not torch.equal(said, say(base, **WAYS[way]))
    if kind == "llama":
        assert said.shape[1] == 16
        hra_fx.merge_adapter(model)
        assert torch.equal(said, say(model, **WAYS[way]))
        hra_fx.unmerge_adapter(model)
    assert torch.equal(said, say(hra_fx.fold(model), **WAYS[way]))


# A pipeline says aloud that it does not support a model whose class it does not know.
@pytest.mark.usefixtures("nothing_is_logged")
def test_a_pipeline() -> None:
    said, words = [], tokenizer()
    words.padding_side = "left"
    base = base_model("SFT").double()
    model = adapted("llama", "transform", base=copy.deepcopy(base))
    randomise(model)
    for each in (model.eval(), rotated(base, model), base):
        generate = pipeline("text-generation", model=each, tokenizer=words, device="cpu")
        said.append(generate([QUESTION, "good blue sky"], batch_size=2, max_new_tokens=6, do_sample=False))
    assert said[0] == said[1] != said[2]
    assert said[0][0][0]["generated_text"].startswith(QUESTION)
