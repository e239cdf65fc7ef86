"""Folders of tiny models and of adapters for them, and their contents."""

from __future__ import annotations

import copy
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_fx

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 37}


def llama(**fields: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **fields))


def bert(kind: str = "BertForMaskedLM", **fields: Any) -> Any:
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL, max_position_embeddings=16, **fields))


def gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 37, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 37}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def randomise(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "hra_u" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def base_of(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a model with random parameters, and a file of another program."""
    randomise(model)
    model.to(dtype).eval().save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text('{"as it": "was"}')
    return folder


def adapter_of(model: nn.Module, folder: Path, *targets: str, seed: int = 2, **fields: Any) -> Path:
    """Save an adapter with random vectors, of a copy of the model."""
    settings = hra_fx.HRAConfig(**{"r": 3, "target_modules": list(targets) or None, **fields})
    torch.manual_seed(seed)  # for anchors
    adapted = hra_fx.transform(copy.deepcopy(model), settings)
    randomise(adapted, seed, 1.0)
    hra_fx.save_adapter(adapted, folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def picture(folder: Path) -> dict[str, bytes]:
    """Path -> content, of all files at any depth."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Context manager in which larger files cannot be written, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
