"""A fold on disk that is refused, and small bases and adapters to be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from safetensors.torch import load_file, save_file

import hra_fx
from hra_fx.errors import CheckpointError, HRAError


def refused(tmp_path: Path, adapter: Any = None, kind: type[HRAError] = CheckpointError, **options: Any) -> str:
    """The message, without the folder of the test, after a look that nothing was written or changed."""
    before = {name: made.picture(tmp_path / name) for name in ("base", "adapter", "out")}
    names = {path.name for path in tmp_path.iterdir()}
    where = {"base_dir": tmp_path / "base", "out_dir": tmp_path / "out", **options}
    with pytest.raises(kind) as caught:
        hra_fx.fold_checkpoint(adapter_dir=tmp_path / "adapter" if adapter is None else adapter, **where)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {name: made.picture(tmp_path / name) for name in before} == before
    return str(caught.value).replace(f"{tmp_path}/", "").replace(str(tmp_path), "TMP")


def stack(tmp_path: Path, **options: Any) -> None:
    made.linear_stack(tmp_path / "base", **options)
    made.stack_adapter(tmp_path / "adapter", **options)


def rewrite(tmp_path: Path, **config: Any) -> None:
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def add(tmp_path: Path, **tensors: torch.Tensor) -> None:
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)
