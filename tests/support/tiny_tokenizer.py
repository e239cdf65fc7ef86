"""A tokenizer of a few words with a chat template, for TRL's trainers and for texts that a model writes."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

QUESTION = "what color is the sky"
WORDS = ["<pad>", "<unk>", "<eos>", "<user>", "<bot>", *QUESTION.split(), "blue", "red", "good", "bad", "no"]
#: With the marks of what the assistant says.
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' ' }}{% else %}"
    "{{ '<bot> ' }}{% generation %}{{ m['content'] + ' <eos> ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def tokenizer() -> Any:
    plain = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    inputs = ["input_ids", "attention_mask"]  # those of a Llama
    made = PreTrainedTokenizerFast(tokenizer_object=plain, model_input_names=inputs, **names)
    made.chat_template = _TEMPLATE
    return made
