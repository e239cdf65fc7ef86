"""Audio models of transformers: from waves, from spectra, and codecs."""

from __future__ import annotations

from typing import Any

import torch
from zoo.entry import Call, Entry
from zoo.inputs import BOTH_SIDES, SMALL, TEXT, Inputs, drawn, hugging, tokens, words

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
    "tdnn_dim": [16, 16],
    "tdnn_kernel": [3, 1],
    "tdnn_dilation": [1, 1],
    "xvector_output_dim": 16,
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
CLAP: dict[str, Any] = {
    "text_config": TEXT | {"projection_dim": 16},
    "audio_config": {
        "spec_size": 32,
        "num_mel_bins": 8,
        "window_size": 4,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "patch_embeds_hidden_size": 8,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "projection_dim": 16,
    },
    "projection_dim": 16,
}
CODEC: dict[str, Any] = {
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 8,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [12.0],
}
DESCRIPT: dict[str, Any] = {
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 16,
    "downsampling_ratios": [2, 4],
    "n_codebooks": 2,
    "codebook_size": 8,
    "codebook_dim": 4,
}
BERT: dict[str, Any] = WAVES | {
    "feature_projection_input_dim": 8,
    "position_embeddings_type": "relative_key",
    "conv_depthwise_kernel_size": 3,
    "hidden_dropout": 0.1,
}
MOONSHINE: dict[str, Any] = TEXT | {
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "decoder_num_attention_heads": 2,
}


def _waves(batch: int, size: int) -> Call:
    """Samples `(batch, time)`."""
    return (), {"input_values": torch.randn(batch, (400, 560)[size])}


def _mono(batch: int, size: int) -> Call:
    """Samples of one channel `(batch, 1, time)`."""
    return (), {"input_values": torch.randn(batch, 1, (64, 96)[size])}


def _spectra(field: str, frames: tuple[int, ...], *, first: str = "time", **extra: Any) -> Inputs:
    """Spectra of eight bins `(batch, frames, 8)`, or `(batch, 8, frames)` where the bins come first."""

    def call(batch: int, size: int) -> Call:
        spectra = torch.randn(batch, frames[size], 8)
        inputs = {field: spectra if first == "time" else spectra.transpose(1, 2).contiguous()}
        return (), inputs | drawn(extra, batch, (5, 7)[size])

    return call


def _transcribed(batch: int, size: int) -> Call:
    """Samples and the words of a decoder."""
    return (), {"input_values": torch.randn(batch, (1200, 1600)[size]), "decoder_input_ids": words(batch, 5)}


def _heard(batch: int, size: int) -> Call:
    """A text, and a spectrum `(batch, 1, time, bins)`."""
    text = tokens()(batch, size)[1]
    return (), text | {"input_features": torch.randn(batch, 1, 32, 8)}


def _audio(name: str, model: str, call: Inputs = _waves, *, sizes: int = 2, **config: Any) -> Entry:
    """An entry from `config`, called with waves unless told otherwise."""
    return Entry(f"transformers/{name}", hugging(model, **config), call, sizes=sizes)


PATCHED: dict[str, Any] = SMALL | {
    "num_mel_bins": 8,
    "max_length": 24,
    "patch_size": 4,
    "frequency_stride": 4,
    "time_stride": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
MELS = "input_features"
BINS = _spectra(MELS, (12, 16))
SPOKEN = _spectra(MELS, (24, 32), decoder_input_ids=words)
#: As many frames as the encoder has positions for, twice.
WHISPERED = _spectra(MELS, (40, 40), first="bins", decoder_input_ids=words)

ENTRIES: list[Entry] = [
    _audio("wav2vec2", "Wav2Vec2ForCTC", **WAVES),
    _audio("wav2vec2_stable", "Wav2Vec2ForSequenceClassification", **WAVES, do_stable_layer_norm=True),
    _audio("wav2vec2_xvector", "Wav2Vec2ForXVector", **WAVES),
    _audio("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", **WAVES, conv_depthwise_kernel_size=3),
    _audio("wav2vec2_bert", "Wav2Vec2BertForCTC", BINS, **BERT),
    _audio("hubert", "HubertForCTC", **WAVES),
    _audio("wavlm", "WavLMForCTC", **WAVES, num_buckets=8, max_bucket_distance=16),
    _audio("data2vec_audio", "Data2VecAudioForCTC", **WAVES, conv_pos_kernel_size=3),
    _audio("unispeech", "UniSpeechForCTC", **WAVES),
    _audio("unispeech_sat", "UniSpeechSatForCTC", **WAVES),
    _audio("sew", "SEWForCTC", **WAVES),
    _audio("sew_d", "SEWDForCTC", **WAVES),
    _audio("ast", "ASTForAudioClassification", _spectra("input_values", (24,)), sizes=1, **PATCHED),
    _audio("whisper", "WhisperForConditionalGeneration", WHISPERED, **SPEECH),
    _audio("whisper_encoder", "WhisperForAudioClassification", _spectra(MELS, (40,), first="bins"), sizes=1, **SPEECH),
    _audio("speech_to_text", "Speech2TextForConditionalGeneration", SPOKEN, **SPEECH),
    _audio("moonshine", "MoonshineForConditionalGeneration", _transcribed, **MOONSHINE),
    _audio("clap", "ClapModel", _heard, **CLAP),
    _audio("encodec", "EncodecModel", _mono, **CODEC),
    _audio("dac", "DacModel", _mono, **DESCRIPT),
]
