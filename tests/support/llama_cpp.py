"""llama.cpp in this process, on prompts of token ids, with greedy decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xllamacpp
from torch import Tensor


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


def complete(
    server: Any, prompt: Sequence[int], count: int, vocabulary: int, scales: Mapping[int, float] | None = None
) -> Continuation:
    """Continue a prompt by some tokens. `scales` are those of adapters by their numbers; `None`: all are 1."""
    request = {"prompt": list(prompt), "max_tokens": count, "temperature": 0, "logprobs": vocabulary}
    if scales is not None:
        request["lora"] = [{"id": number, "scale": scale} for number, scale in scales.items()]
    content = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    table = torch.full((len(content), vocabulary), -torch.inf, dtype=torch.float64)
    for row, entry in zip(table, content, strict=True):
        for candidate in entry["top_logprobs"]:
            row[candidate["id"]] = candidate["logprob"]
    return Continuation([entry["id"] for entry in content], table)
