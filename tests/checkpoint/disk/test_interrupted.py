"""A fold that is killed, interrupted or refused by the disk leaves the base and the output folder as they were."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from checkpoint.folders import files_of_at_most, interrupted
from safetensors.torch import save_file

import hra_fx
from hra_fx.errors import CheckpointError


def prepared(tmp_path: Path, layers: int = 4, width: int = 64) -> tuple[Path, Path]:
    """A base and an adapter."""
    base = made.linear_stack(tmp_path / "base", layers=layers, width=width)
    (base / "tokenizer.json").write_text("x" * 100)
    return base, made.stack_adapter(tmp_path / "adapter", layers=layers, width=width)


@contextlib.contextmanager
def started(base: Path, adapter: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that folds as soon as it has imported the library, which it says."""
    code = (
        "import signal, sys, hra_fx; from hra_fx.checkpoint.disk import writing\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); print('ready', flush=True)\n"
        "hra_fx.fold_checkpoint(*sys.argv[1:], columns=[], overwrite=True)"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", code, str(base), str(adapter), str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    base, adapter = prepared(tmp_path, 24, 192)
    before, random_moment = made.contents(base), random.Random(0)
    with started(base, adapter, tmp_path / "whole") as process:
        begin = time.perf_counter()
        assert process.wait(60) == 0
    whole, due = time.perf_counter() - begin, made.contents(tmp_path / "whole")
    killed = 0
    for i in range(8):
        with started(base, adapter, out := tmp_path / str(i)) as process:
            time.sleep(random_moment.random() * whole)
            process.kill()
            killed += process.wait(60) == -signal.SIGKILL
        assert not out.exists() or made.contents(out) == due
        hra_fx.fold_checkpoint(base, adapter, out, columns=[], overwrite=True)
        assert made.contents(out) == due
    assert killed >= 3 and made.contents(base) == before


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    base, adapter = prepared(tmp_path)
    with open(base / "zzz", "wb") as file:
        file.truncate(1 << 33)  # a hole, which takes a while to copy
    with started(base, adapter, tmp_path / "out") as process:
        while process.poll() is None and not list(tmp_path.glob(".out.*.partial/content/zzz")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.slow
def test_ctrl_c_between_the_renames_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    base, adapter = prepared(tmp_path, layers=1)
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "new", columns=[])
    old, new = {"old": b"x"}, made.picture(tmp_path / "new")
    outcomes, out = [], tmp_path / "out"

    def fold() -> None:
        hra_fx.fold_checkpoint(base, adapter, out, columns=[], overwrite=True, progress=False)

    while True:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "old").write_bytes(b"x")
        if not interrupted(fold, "_publish", len(outcomes) + 1):
            break
        outcomes.append("old" if made.picture(out) == old else made.contents(out))
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "new", "out"}
    assert outcomes[0] == "old" and outcomes[-1] == made.contents(tmp_path / "new")
    assert all(outcome in ("old", outcomes[-1]) for outcome in outcomes) and made.picture(tmp_path / "new") == new


def test_a_disk_that_refuses_leaves_the_old_folder(tmp_path: Path) -> None:
    base, adapter = prepared(tmp_path)
    big = {"3.weight": torch.ones(400, 64), "3.bias": torch.ones(400)}
    save_file(big, base / "model-00004-of-00004.safetensors", {"format": "pt"})
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    due = made.picture(tmp_path / "out")
    for refusing, size in (("weights", 50_000), ("a copy", 200_000)):
        if refusing == "a copy":
            (base / "zzz").write_bytes(bytes(300_000))
        with files_of_at_most(size), pytest.raises(CheckpointError) as caught:
            hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[], overwrite=True)
        start, end = str(caught.value).split("File too large")
        assert start.startswith(f"{tmp_path / 'out'}: cannot write the result (")
        assert end.endswith(
            "). The output folder is unchanged. Free some space, check the disk, or choose another output folder."
        )
        assert made.picture(tmp_path / "out") == due
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_a_base_that_is_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    """A file with a hole, of 2 TiB."""
    base, adapter = prepared(tmp_path)
    size = 1 << 41
    text = json.dumps({"9.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(base / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    with pytest.raises(CheckpointError, match=r"bytes are needed, but only [\d,]+ are free\. Free some space, or"):
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert os.path.getsize(base / "x.safetensors") > size
