"""`own_texts`: what a model writes is drawn from the distribution of its base, without special tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny import bert, gpt2, llama, t5, vit
from tiny_tokenizer import WORDS, tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, ConfigError

# A name that transformers has had since 5.0, and means to rename; PEFT uses it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
SPECIAL = [0, 1, 2]  # of the tiny Llama


def saved(base: nn.Module) -> nn.Module:
    model = hra_fx.transform(base, hra_fx.HRAConfig(**FIELDS, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(-1)
    return model


def of_peft(config: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda base: peft.get_peft_model(base, config)


WAYS: dict[str, Callable[[Any], Any]] = {
    "no adapters": lambda base: base,
    "transform": lambda base: hra_fx.transform(base, hra_fx.HRAConfig(**FIELDS)),
    "modules_to_save": saved,
    "HRAModel": lambda base: hra_fx.get_peft_model(base, hra_fx.HRAConfig(**FIELDS, task_type="CAUSAL_LM")),
    "DataParallel": lambda base: nn.DataParallel(hra_fx.transform(base, hra_fx.HRAConfig(**FIELDS))),
    "LoRA": of_peft(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")),
    "prompt": of_peft(peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "mixed": lambda base: peft.PeftMixedModel(
        base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    ),
    "injected": lambda base: peft.inject_adapter_in_model(peft.HRAConfig(**FIELDS), base),
}


def drawn(model: Any, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Tokens of a model, each from the logits of the whole text before it."""
    ids = first
    while ids.shape[1] < length:
        with torch.no_grad():
            chances = model(input_ids=ids).logits[:, -1].softmax(-1)
        chances[:, SPECIAL] = 0
        ids = torch.cat([ids, torch.multinomial(chances / chances.sum(-1, keepdim=True), 1, generator=generator)], 1)
    return ids


def written_by_hand(
    model: Any, rows: tuple[int, ...], length: int, seed: int, start: tuple[int, ...] = ()
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.ones(model.config.vocab_size)
    uniform[SPECIAL] = 0
    batches = []
    for count in rows:
        first = torch.multinomial(uniform.expand(count, -1), 1, generator=generator)
        first = torch.cat([torch.tensor(start).long().expand(count, -1), first], 1)
        batches.append(drawn(model, first, length, generator))
    return batches


def state_of(model: nn.Module) -> Any:
    flags = [part.training for part in model.modules()], [one.requires_grad for one in model.parameters()]
    return flags, torch.get_rng_state().tolist(), [one.detach().clone() for one in model.state_dict().values()]


@pytest.mark.parametrize("way", WAYS)
def test_the_base_writes_the_texts(way: str) -> None:
    base = llama(attention_dropout=0.5).eval()
    wanted = written_by_hand(base, (3, 3, 1), length=12, seed=7)
    model = WAYS[way](copy.deepcopy(base)).train()
    next(model.modules()).eval()
    before = state_of(model)
    with torch.inference_mode():
        found = hra_fx.own_texts(model, 7, 12, 3, seed=7)
    torch.testing.assert_close([batch["input_ids"] for batch in found], wanted)
    torch.testing.assert_close(state_of(model), before, rtol=0, atol=0)
    assert not any(batch["input_ids"].is_inference() for batch in found)
    assert not torch.equal(found[0]["input_ids"], hra_fx.own_texts(model, 3, 12, seed=8)[0]["input_ids"])


def test_a_chat_template_and_special_tokens_of_a_tokenizer() -> None:
    padded = llama(vocab_size=len(WORDS) + 5, bos_token_id=None, pad_token_id=0, eos_token_id=2)
    user, bot = WORDS.index("<user>"), WORDS.index("<bot>")
    words = tokenizer()
    ids = hra_fx.own_texts(padded, 40, 9, 40, tokenizer=words)[0]["input_ids"]
    assert (ids[:, 0] == user).all()
    assert (ids[:, 4] == bot).all()
    free = ids[:, [1, 2, 3, 5, 6, 7, 8]]
    assert set(free.flatten().tolist()) <= set(range(2, len(WORDS))) - {2}
    assert free[:, 0].unique().numel() > 1
    words.chat_template = "{{ messages[0]['content'] }}<bot>"
    ids = hra_fx.own_texts(padded, 40, 9, 40, tokenizer=words)[0]["input_ids"]
    assert (ids[:, 4] == bot).all() and ids[:, 0].unique().numel() > 1
    words.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ConfigError, match="does not contain a message as it is"):
        hra_fx.own_texts(padded, tokenizer=words)

    words.add_special_tokens({"bos_token": "<bot>", "additional_special_tokens": ["<user>"]})
    words.chat_template = None
    ids = hra_fx.own_texts(padded, 40, 9, 40, tokenizer=words)[0]["input_ids"]
    assert set(ids.flatten().tolist()) == set(range(5, len(WORDS)))


def test_after_the_special_token_of_a_start_the_first_token_is_drawn_uniformly() -> None:
    base, words = llama(vocab_size=len(WORDS)).eval(), tokenizer()
    words.add_special_tokens({"bos_token": "<unk>"})
    words.chat_template = None
    words._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    found = hra_fx.own_texts(base, 40, 4, 40, seed=7, tokenizer=words)
    torch.testing.assert_close(found[0]["input_ids"], written_by_hand(base, (40,), 4, seed=7, start=(1,))[0])


@pytest.mark.parametrize("make", [bert, vit, t5, lambda: llama("LlamaModel"), lambda: nn.Linear(4, 4)])
def test_other_models_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(AdapterError, match=f"needs a causal language model, got {type(model).__name__}. Pass `samples"):
        hra_fx.own_texts(model)


def test_bad_arguments() -> None:
    model = gpt2()
    for arguments, text in (
        ({"count": 0}, "`count` must be a positive int, got 0"),
        ({"length": 2.0}, r"`length` must be a positive int, got 2\.0"),
        ({"batch_size": True}, "`batch_size` must be a positive int, got True"),
        ({"length": 33}, "at most the model's max_position_embeddings = 32, got 33"),
        ({"length": 3, "tokenizer": tokenizer()}, "`length` must be at least 4, got 3: 2 tokens"),
    ):
        with pytest.raises(ConfigError, match=text):
            hra_fx.own_texts(model, **arguments)


@pytest.mark.parametrize("way", ["LoRA", "HRAModel"])
def test_merged_adapters_are_refused(way: str) -> None:
    model: Any = WAYS[way](llama())
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        hra_fx.own_texts(model)
