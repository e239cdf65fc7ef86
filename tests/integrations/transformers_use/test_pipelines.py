"""The pipelines of transformers, which look at the class of a model, take an adapted one as the model that it is."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import BASES, VOCABULARY, adapted, rotated, turn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, pipeline

TEXTS = ["w5 w7 w9", "w30 w8 w61 w4 w12"]
DECODING = {"max_new_tokens": 6, "do_sample": False}


# A pipeline says aloud that it does not support a model whose class it does not know.
pytestmark = pytest.mark.usefixtures("nothing_is_logged")


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token."""
    words = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    plain = Tokenizer(WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def pair(kind: str, shape: str) -> tuple[Any, Any]:
    """An adapted model, and the base model with its weights rotated."""
    base = BASES[kind](pad_token_id=2).double()
    model = adapted(kind, shape, base=BASES[kind](pad_token_id=2).double())
    turn(model)
    return model.eval(), rotated(base, model)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_text_generation(batch_size: int) -> None:
    texts = []
    for model in pair("llama", "transform"):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
        texts.append(generate(TEXTS, batch_size=batch_size, **DECODING))
    assert texts[0] == texts[1]
    assert all(answer[0]["generated_text"].startswith(text) for answer, text in zip(texts[0], TEXTS, strict=True))


def test_text_classification() -> None:
    found = []
    for model in pair("bert", "HRAModel"):
        classify = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")
        found.append(classify(TEXTS, top_k=None))
    for actual, expected in zip(*found, strict=True):
        assert [entry["label"] for entry in actual] == [entry["label"] for entry in expected]
        for mine, wanted in zip(actual, expected, strict=True):
            assert mine["score"] == pytest.approx(wanted["score"], rel=1e-6)
