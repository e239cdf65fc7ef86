"""Encoder-decoders of transformers, called with the tokens of both sides (of different lengths)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from zoo.entry import Entry
from zoo.inputs import BOTH_SIDES, TEXT, Inputs, hugging, leading, tokens, words

T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = BOTH_SIDES | {
    "dropout": 0.1,
    "activation_dropout": 0.1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
PROPHET: dict[str, Any] = {
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
}


def _shorter(batch: int, length: int) -> Tensor:
    """Target tokens, fewer than those of the source."""
    return words(batch, length - 4)


def _pair(name: str, model: str, call: Inputs | None = None, **config: Any) -> Entry:
    """An entry of the usual sizes, with those of `config` in place of them; None takes one out."""
    return Entry(f"transformers/{name}", hugging(model, **TEXT | config), call or tokens(decoder_input_ids=_shorter))


LED: dict[str, Any] = BART | {
    "attention_window": [4, 4],
    "max_encoder_position_embeddings": 32,
    "max_decoder_position_embeddings": 32,
}
GLOBAL = tokens((8, 12), decoder_input_ids=_shorter, global_attention_mask=leading)


ENTRIES: list[Entry] = [
    _pair("t5", "T5ForConditionalGeneration", **T5),
    _pair("t5_gated", "T5ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    _pair("mt5", "MT5ForConditionalGeneration", **T5),
    _pair("umt5", "UMT5ForConditionalGeneration", **T5),
    _pair("longt5", "LongT5ForConditionalGeneration", **T5, local_radius=3, encoder_attention_type="local"),
    _pair("bart", "BartForConditionalGeneration", **BART),
    _pair("mbart", "MBartForConditionalGeneration", **BART),
    _pair("plbart", "PLBartForConditionalGeneration", **BART),
    _pair("mvp", "MvpForConditionalGeneration", **BART, use_prompt=True, prompt_length=2, prompt_mid_dim=16),
    _pair("pegasus", "PegasusForConditionalGeneration", **BART),
    _pair("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", **BART, attention_type="original_full"),
    _pair("marian", "MarianMTModel", **BART),
    _pair("m2m_100", "M2M100ForConditionalGeneration", **BART, encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    _pair("blenderbot", "BlenderbotForConditionalGeneration", **BART),
    _pair("blenderbot_small", "BlenderbotSmallForConditionalGeneration", **BART),
    _pair("led", "LEDForConditionalGeneration", GLOBAL, **LED),
    _pair("fsmt", "FSMTForConditionalGeneration", **BART, src_vocab_size=50, tgt_vocab_size=50, langs=["a", "b"]),
    _pair("prophetnet", "ProphetNetForConditionalGeneration", **PROPHET, num_hidden_layers=None),
]
