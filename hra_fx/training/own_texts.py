"""Texts that a causal language model writes itself, as samples of what it knows."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.config_fields import check_positive_int
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.example_inputs import device_of, preserve_rng_state
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

    The texts depend on `seed` and `batch_size` alone: no random number generator of the process is used or changed. If
    several processes train a model, each of them calls this and gets the same texts.

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
            are those of the chat template; or `tokenizer` is not a tokenizer.
        AdapterError: the model is not a causal language model, or adapters of PEFT are merged.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = {"vocab_size": 100, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> samples = own_texts(model, count=12, length=5)
        >>> [tuple(batch["input_ids"].shape) for batch in samples]
        [(8, 5), (4, 5)]
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # which transformers needs

    for name, value in (("count", count), ("length", length), ("batch_size", batch_size)):
        check_positive_int(name, value)
    writer = _writer(model, length)
    plan, chats = _plan(tokenizer, length)
    allowed = _allowed(writer, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    eager = torch.compiler.set_stance("force_eager")
    # In inference mode, the texts could not be trained on.
    with torch.inference_mode(False), without_adapters(unwrap(model)), preserve_rng_state(), eager:
        for start in tqdm(range(0, count, batch_size), desc="own texts", delay=2, leave=False):
            rows = min(batch_size, count - start)
            batches.append({"input_ids": _written(writer, rows, plan, allowed, generator, uniform=not chats)})
    reshard(model.modules())  # FSDP2 keeps some parameters whole after a forward without a backward pass
    return batches


def _writer(model: nn.Module, length: int) -> Any:
    """The causal language model of transformers in a model. Its layers may have adapters."""
    check_is_module(model)
    inner: Any = unwrap(model)
    writer = inner.get_base_model() if is_of_peft(inner) and hasattr(inner, "get_base_model") else inner
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


def _plan(tokenizer: Any, length: int) -> tuple[list[int | None], bool]:
    """The tokens of a text, None for those that the model writes; and whether it is a chat."""
    if tokenizer is not None and not hasattr(tokenizer, "all_special_ids"):
        raise ConfigError(
            f"`tokenizer` must be a tokenizer of transformers, got {type(tokenizer).__name__}. For a processor, pass "
            "processor.tokenizer."
        )
    before: list[int] = []
    after: list[int] = []
    chats = tokenizer is not None and bool(tokenizer.chat_template)
    if chats:
        said = [{"role": "user", "content": _SAID}]
        chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        if _SAID not in chat:
            raise ConfigError("the chat template of `tokenizer` does not contain a message as it is. Pass `samples`.")
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in chat.rsplit(_SAID, 1))
    elif tokenizer is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        before = [tokenizer.bos_token_id]
    free = length - len(before) - len(after)
    if free < 1 + chats:
        raise ConfigError(
            f"`length` must be at least {length - free + 1 + chats}, got {length}: {length - free} tokens of each text "
            "are those of the tokenizer."
        )
    message = free // 2 if chats else 0
    return [*before, *[None] * message, *after, *[None] * (free - message)], chats


def _allowed(model: Any, tokenizer: Any) -> Tensor:
    """Which tokens of the vocabulary, `(vocabulary,)`, a text may contain."""
    text_config = model.config.get_text_config()
    allowed = torch.ones(text_config.vocab_size, dtype=torch.bool)
    special: set[Any] = set()
    for config in (model.config, text_config, model.generation_config):
        for name, value in config.to_dict().items() if config is not None else ():
            if name.endswith(("_token_id", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    if tokenizer is not None:
        allowed[len(tokenizer) :] = False  # rows that pad the embedding
        special.update(tokenizer.all_special_ids)
        special.update(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    allowed[[token for token in special if isinstance(token, int) and 0 <= token < len(allowed)]] = False
    return allowed


def _written(
    model: Any, rows: int, plan: list[int | None], allowed: Tensor, generator: torch.Generator, *, uniform: bool
) -> Tensor:
    """Texts `(rows, length)`. With `uniform`, the first token that the model does not get is drawn uniformly."""
    device = device_of(model)
    # The name of the cache depends on the release of transformers. Without a cache, each call reads the whole text.
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    drawn = plan.index(None) if uniform or plan[0] is None else None
    ids = torch.empty(rows, 0, dtype=torch.int64)
    logits, cache = torch.empty(0), None
    for place, planned in enumerate(plan):
        if planned is not None:
            token = torch.full((rows, 1), planned)
        else:
            scores = torch.zeros(rows, len(allowed)) if place == drawn else logits.float().cpu()
            chances = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            token = torch.multinomial(chances, 1, generator=generator)
        ids = torch.cat([ids, token], dim=1)
        if place + 1 == len(plan):
            break
        cached = {} if name is None else {name: cache, "use_cache": True}
        output = model(input_ids=(ids if cache is None else token).to(device), **cached)
        cache = None if name is None else getattr(output, name, None)
        logits = output.logits[:, -1, : len(allowed)]
    return ids.to(device)
