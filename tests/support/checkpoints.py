"""Folders of tiny models and of adapters for them, and their contents."""

from __future__ import annotations

import copy
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_fx


def llama(**fields: Any) -> Any:
    return tiny.llama(**tiny.SMALL | {"num_key_value_heads": 1} | fields)


def bert(kind: str = "BertForMaskedLM", **fields: Any) -> Any:
    return tiny.bert(kind, **tiny.SMALL | fields)


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
    adapted = hra_fx.transform(copy.deepcopy(model), settings)
    randomise(adapted, seed, 1.0)
    hra_fx.save_adapter(adapted, folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder: copies, because a test may write the file again."""
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor.clone() for file in files for key, tensor in load_file(file).items()}


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
