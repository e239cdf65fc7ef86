"""Audio models of transformers: from waves, from spectra, and codecs."""

from __future__ import annotations

from typing import Any

import torch
from zoo.entry import Call, Entry
from zoo.inputs import BOTH_SIDES, SMALL, TEXT, Inputs, drawn, hugging, words

#: Without layer drop and masks in time, which numpy draws.
WAVES: dict[str, Any] = SMALL | {
    "vocab_size": 20,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 16,
    "num_codevectors_per_group": 4,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
}
SPEECH: dict[str, Any] = {
    **TEXT,
    **BOTH_SIDES,
    "dropout": 0.1,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 16,
    "begin_suppress_tokens": None,
    "decoder_start_token_id": 1,
    "input_feat_per_channel": 8,
    "conv_channels": 16,
}
BERT: dict[str, Any] = WAVES | {
    "feature_projection_input_dim": 8,
    "position_embeddings_type": "relative_key",
    "conv_depthwise_kernel_size": 3,
    "hidden_dropout": 0.1,
}


def _waves(batch: int, size: int) -> Call:
    """Samples `(batch, time)`."""
    return (), {"input_values": torch.randn(batch, (400, 560)[size])}


def _spectra(field: str, frames: tuple[int, ...], *, first: str = "time", **extra: Any) -> Inputs:
    """Spectra of eight bins `(batch, frames, 8)`, or `(batch, 8, frames)` where the bins come first."""

    def call(batch: int, size: int) -> Call:
        spectra = torch.randn(batch, frames[size], 8)
        inputs = {field: spectra if first == "time" else spectra.transpose(1, 2).contiguous()}
        return (), inputs | drawn(extra, batch, (5, 7)[size])

    return call


def _audio(name: str, model: str, call: Inputs = _waves, *, sizes: int = 2, **config: Any) -> Entry:
    """An entry from `config`, called with waves unless told otherwise."""
    return Entry(f"transformers/{name}", hugging(model, **config), call, sizes=sizes)


MELS = "input_features"
BINS = _spectra(MELS, (12, 16))
SPOKEN = _spectra(MELS, (24, 32), decoder_input_ids=words)
#: As many frames as the encoder has positions for, twice.
WHISPERED = _spectra(MELS, (40, 40), first="bins", decoder_input_ids=words)

ENTRIES: list[Entry] = [
    _audio("wav2vec2", "Wav2Vec2ForCTC", **WAVES),
    _audio("wav2vec2_stable", "Wav2Vec2ForSequenceClassification", **WAVES, do_stable_layer_norm=True),
    _audio("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", **WAVES, conv_depthwise_kernel_size=3),
    _audio("wav2vec2_bert", "Wav2Vec2BertForCTC", BINS, **BERT),
    _audio("hubert", "HubertForCTC", **WAVES),
    _audio("wavlm", "WavLMForCTC", **WAVES, num_buckets=8, max_bucket_distance=16),
    _audio("data2vec_audio", "Data2VecAudioForCTC", **WAVES, conv_pos_kernel_size=3),
    _audio("unispeech", "UniSpeechForCTC", **WAVES),
    _audio("unispeech_sat", "UniSpeechSatForCTC", **WAVES),
    _audio("sew", "SEWForCTC", **WAVES),
    _audio("sew_d", "SEWDForCTC", **WAVES),
    _audio("whisper", "WhisperForConditionalGeneration", WHISPERED, **SPEECH),
    _audio("whisper_encoder", "WhisperForAudioClassification", _spectra(MELS, (40,), first="bins"), sizes=1, **SPEECH),
    _audio("speech_to_text", "Speech2TextForConditionalGeneration", SPOKEN, **SPEECH),
]
