"""llama.cpp with a LoRA adapter, in this process."""

from __future__ import annotations

from pathlib import Path

import xllamacpp


def llama_cpp_text(model: Path, adapter: Path, prompt: list[int], words: int) -> str:
    """The text that llama.cpp's server adds to a prompt by greedy decoding.

    Args:
        model: the base model, a GGUF file, quantized or not.
        adapter: the adapter, a GGUF file.
        prompt: token ids.
        words: number of tokens to add.
    """
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    parameters.n_ctx = 256
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = -1  # silent
    request = {"prompt": prompt, "max_tokens": words, "temperature": 0}
    text: str = xllamacpp.Server(parameters).handle_completions(request)["choices"][0]["text"]
    return text
