"""Texts that a causal language model writes itself, as samples of what it knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.config_fields import check_positive_int
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.example_inputs import device_of, preserve_rng_state, seed_everything
from hra_fx.layers.peft_layers import is_of_peft
from hra_fx.layers.sharding import reshard
from hra_fx.model.state import check_is_module, unwrap
from hra_fx.training.without_adapters import without_adapters

#: Stands for what a user says in a chat template.
_SAID = "hra_fx-user-message"


def own_texts(
    model: nn.Module, count: int = 64, length: int = 64, batch_size: int = 8, seed: int = 0, *, tokenizer: Any = None
) -> list[dict[str, Tensor]]:
    """Let a causal language model write texts with its adapters off, as samples of what it knows.

    The first token is drawn uniformly from the vocabulary, and the others from the model's distribution at
    temperature 1. Each text has exactly `length` tokens, without padding. The model writes no special tokens: those
    that its configurations name (`..._token_id`), and those of the tokenizer.

    Pass the tokenizer of a chat model. Each text is then a message of the user and an answer in the model's chat
    template, in equal parts, and the model writes both. If the tokenizer has no chat template, but starts texts with a
    special token, these texts start with it.

    The texts depend on `seed`, `batch_size` and the type of the device alone, and the random number generators of the
    process are not changed. If several processes train a model, each of them calls this and gets the same texts.

    Args:
        model: a causal language model of transformers: transformed, a `PeftModel` or without adapters; wrapped or not.
        count: the number of texts.
        length: the number of tokens of each text.
        batch_size: the number of texts in a batch; the last batch may have fewer.
        seed: chooses the texts.
        tokenizer: the tokenizer of the model.

    Returns:
        Batches `{"input_ids": (batch_size, length)}` on the device of the model.

    Raises:
        ConfigError: a number is not a positive int; the model does not have positions for `length` tokens; all of them
            are those of the chat template.
        AdapterError: the model is not a causal language model, or adapters are merged.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = {"vocab_size": 100, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> samples = own_texts(model, count=12, length=5)
        >>> [tuple(batch["input_ids"].shape) for batch in samples]
        [(8, 5), (4, 5)]
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # which transformers needs
    from transformers import GenerationConfig

    for name, value in (("count", count), ("length", length), ("batch_size", batch_size)):
        check_positive_int(name, value)
    writer = _writer(model, length)
    plan = _plan(tokenizer, length)
    banned = _banned(writer, tokenizer)
    batches = []
    settings = GenerationConfig(do_sample=True, top_k=0, suppress_tokens=banned or None)  # type: ignore[no-untyped-call]
    eager = torch.compiler.set_stance("force_eager")
    # In inference mode, the texts could not be trained on.
    with torch.inference_mode(False), without_adapters(unwrap(model)), preserve_rng_state(), eager:
        own, writer.generation_config = writer.generation_config, settings  # its values would replace defaults
        try:
            seed_everything(seed)
            for start in tqdm(range(0, count, batch_size), desc="own texts", delay=2, leave=False):
                batches.append({"input_ids": _written(writer, min(batch_size, count - start), plan, banned)})
        finally:
            writer.generation_config = own
    reshard(model.modules())  # FSDP2 keeps some parameters whole after a forward without a backward pass
    return batches


def _writer(model: nn.Module, length: int) -> Any:
    """The causal language model of transformers in a model. Its layers may have adapters."""
    check_is_module(model)
    inner: Any = unwrap(model)
    writer = inner
    if is_of_peft(inner):  # a PeftMixedModel has no method for it
        writer = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model
    config: Any = getattr(writer, "config", None)
    if (
        not callable(getattr(writer, "can_generate", None))
        or not writer.can_generate()
        or config.is_encoder_decoder
        or writer.main_input_name != "input_ids"
    ):
        found = f"a graph of {type(writer).__name__}" if isinstance(writer, fx.GraphModule) else type(writer).__name__
        raise AdapterError(f"own_texts needs a causal language model, got {found}. Pass `samples`.")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < length:
        raise ConfigError(f"`length` must be at most the model's max_position_embeddings = {positions}, got {length}.")
    return writer


def _plan(tokenizer: Any, length: int) -> list[list[int] | int]:
    """What a text consists of: tokens that are given, and numbers of tokens that the model writes."""
    if tokenizer is None:
        return [length]
    if not tokenizer.chat_template:
        has_start = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return [[tokenizer.bos_token_id], length - 1] if has_start and length > 1 else [length]
    said = [{"role": "user", "content": _SAID}]
    chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    if _SAID not in chat:
        raise ConfigError("the chat template of `tokenizer` does not contain a message as it is. Pass `samples`.")
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in chat.rsplit(_SAID, 1))
    free = length - len(before) - len(after)
    if free < 2:
        raise ConfigError(
            f"`length` must be at least {length - free + 2}, got {length}: {length - free} tokens of each text "
            "are those of the chat template."
        )
    return [before, free // 2, after, free - free // 2]


def _banned(model: Any, tokenizer: Any) -> list[int]:
    """The tokens of the vocabulary that a text must not contain."""
    text_config = model.config.get_text_config()
    banned: set[Any] = set()
    for config in (model.config, text_config, model.generation_config):
        for name, value in config.to_dict().items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                banned.update(value if isinstance(value, (list, tuple)) else [value])
    if tokenizer is not None:
        banned.update(range(len(tokenizer), text_config.vocab_size))  # rows that pad the embedding
        banned.update(tokenizer.all_special_ids)
        banned.update(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return [token for token in banned if isinstance(token, int) and 0 <= token < text_config.vocab_size]


def _written(model: Any, rows: int, plan: list[list[int] | int], banned: list[int]) -> Tensor:
    """Texts `(rows, length)`. The first token is drawn uniformly, unless a chat template comes before it."""
    device = device_of(model)
    chances = torch.ones(model.config.get_text_config().vocab_size).index_fill(0, torch.tensor(banned).long(), 0)
    ids = torch.empty(rows, 0, dtype=torch.int64)
    for part in plan:
        if isinstance(part, list):
            ids = torch.cat([ids, torch.tensor(part, dtype=torch.int64).expand(rows, -1).to(ids.device)], dim=1)
            continue
        first = int(not ids.shape[1] or (len(plan) == 2))
        if first:
            ids = torch.cat([ids, torch.multinomial(chances.expand(rows, -1), 1)], dim=1)
        ids = ids.to(device)
        if part > first:
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=part - first)
    return ids
