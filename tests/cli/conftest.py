"""A tiny Llama on disk with adapters for it, created once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import adapter_of, base_of, llama
from torch import nn


@dataclass(frozen=True)
class Shelf:
    """A read-only folder with checkpoints, and their model."""

    folder: Path
    model: nn.Module

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist sets COLUMNS in its workers, but a pipe has no width."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    model = llama()
    base_of(model, folder / "my-model")
    adapter_of(model, folder / "my-adapter", "q_proj", "v_proj", r=4)
    adapter_of(model, folder / "second", "q_proj", "o_proj", seed=3, r=2)
    adapter_of(model, folder / "orthonormal", "q_proj", "o_proj", seed=4, r=2, apply_GS=True)
    return Shelf(folder, model)
