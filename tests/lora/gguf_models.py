"""Tiny random transformers models, and their model files for llama.cpp in float32.

The files are written from the format's description alone, without hra_fx: a test compares llama.cpp with PyTorch on
them before an adapter is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
import transformers
import xllamacpp
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Model type: llama.cpp's name, and fields of the configuration beyond `SIZES`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3_text": ("gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "phi3": ("phi3", {"sliding_window": None}),
    "smollm3": ("smollm3", {}),
    "granite": ("granite", {}),
}
#: llama.cpp rotates neighboring rows of these.
PAIRED = ("llama", "mistral", "smollm3", "granite")


class TabulatedGELU(nn.Module):
    """The GELU of llama.cpp on CPUs: a table of half-precision values for half-precision inputs."""

    def forward(self, x: Tensor) -> Tensor:
        table = functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, table, x.relu())


def tiny(model_type: str, **fields: Any) -> transformers.PreTrainedModel:
    """A random model whose greedy text depends on every layer."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | MODELS[model_type][1] | fields))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "GELUTanh":
                setattr(module, name, TabulatedGELU())
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that attention is not uniform, and norms and biases are not their defaults.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write_model(model: transformers.PreTrainedModel, path: Path) -> Path:
    """The model file for llama.cpp."""
    config, name = model.config, MODELS[model.config.model_type][0]
    writer = gguf.GGUFWriter(path, name)
    writer.add_type(gguf.GGUFType.MODEL)
    _sizes(writer, config)
    _tokens(writer)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target, key
        writer.add_tensor(target, _stored(key, tensor, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    rotary = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    if config.model_type in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _tokens(writer: gguf.GGUFWriter) -> None:
    """Three control tokens and words: byte tokens would be left out of answers until they are a whole character."""
    types = gguf.TokenType
    special = ["<unk>", "<s>", "</s>", "<0x0A>"]
    words = [f" word{number}" for number in range(VOCABULARY - len(special))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(special + words)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([types.UNKNOWN, types.CONTROL, types.CONTROL, types.BYTE, *[types.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _stored(key: str, tensor: Tensor, config: Any) -> Tensor:
    """A weight as llama.cpp stores it."""
    if config.model_type.startswith("gemma") and key.endswith("norm.weight"):
        return tensor + 1
    if config.model_type in PAIRED and (".q_proj." in key or ".k_proj." in key):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # llama.cpp rotates neighbors: rows 0, half, 1, half + 1, ... of every head.
        order = [
            head + half * (size // 2) + row
            for head in range(0, len(tensor), size)
            for row in range(size // 2)
            for half in (0, 1)
        ]
        return tensor[order]
    return tensor


# ---- llama.cpp in this process, on prompts of token ids, with greedy decoding ----


class Continuation(NamedTuple):
    """The tokens of a greedy server, and the log-probabilities of the vocabulary at each position, float64."""

    tokens: list[int]
    log_probabilities: Tensor


def serve(base: Path, *adapters: Path) -> Any:
    """A server of a model file with adapters, all at scale 1, until nothing refers to it."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(base)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
    parameters.n_ctx = 256
    # Exact: a cache of keys and values in float16 would cost 3 of the 7 digits.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = -1  # silent
    return xllamacpp.Server(parameters)


def complete(server: Any, prompt: Sequence[int], count: int, vocabulary: int) -> Continuation:
    """Continue a prompt by some tokens."""
    request = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, "logprobs": vocabulary}
    content = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    table = torch.full((len(content), vocabulary), -torch.inf, dtype=torch.float64)
    for row, entry in zip(table, content, strict=True):
        for candidate in entry["top_logprobs"]:
            row[candidate["id"]] = candidate["logprob"]
    return Continuation([entry["id"] for entry in content], table)
