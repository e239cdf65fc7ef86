"""An adapter's folder, its content, refusals, and a full disk."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, write
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError

KEY = "base_model.model.0.hra_u"
CONFIG = HRAConfig(r=2, target_modules=["0"]).to_json_string()
BOTH = [CONFIG_NAME, WEIGHTS_NAME]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, seed: int = 0) -> Path:
    write(folder, CONFIG, {KEY: normal(6, 2, seed=seed)}, {})
    return folder


def picture(folder: Path) -> dict[str, bytes | None]:
    """Every path in a folder, hidden ones too, with what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(source: Any, subfolder: str | None = None, **hub: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(source, subfolder, **hub)
    return str(caught.value)


def unwritten(folder: Path, tensors: Mapping[str, Tensor], config: str = CONFIG, **metadata: str) -> str:
    """The message of a refusal to write, after a look that the folder is as it was."""
    before = picture(folder)
    with pytest.raises(CheckpointError) as caught:
        write(folder, config, tensors, metadata)
    assert picture(folder) == before
    return str(caught.value)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write larger files, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
