"""A fold that is killed, interrupted or refused by the disk leaves the folders as they were; `verify` finds damage."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from checkpoint.folders import files_of_at_most
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import load_file, save_file

import hra_fx
from hra_fx.checkpoint.disk.arguments import read_request
from hra_fx.checkpoint.disk.plan import FilePlan, plan_fold
from hra_fx.checkpoint.disk.writing import check_copy, check_file
from hra_fx.errors import CheckpointError, FoldError


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


# ---- what `verify=True` finds ----


def written(tmp_path: Path, *targets: str, gpt2: bool = False) -> tuple[FilePlan, Path]:
    """The plan of a fold, and the weights that it gave."""
    model = made.gpt2() if gpt2 else made.bert("BertForSequenceClassification")
    base = made.base_of(model, tmp_path / "base")
    saved = {} if gpt2 else {"modules_to_save": ["classifier"]}
    adapter = made.adapter_of(model, tmp_path / "adapter", *targets, **saved)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", verify=True)
    assert report.verified and "verified: row norms are preserved" in str(report)
    plan = plan_fold(read_request(base, adapter, tmp_path / "elsewhere"), None, inverse=False)
    planned = plan.files["model.safetensors"]
    assert isinstance(planned, FilePlan)
    return planned, tmp_path / "out" / "model.safetensors"


QUERY = "bert.encoder.layer.1.attention.self.query.weight"
C_ATTN = "transformer.h.0.attn.c_attn.weight"
#: What was adapted, the changed value: tensor, place, by how much; and the message.
CHANGES: dict[str, tuple[str, str, tuple[int, ...], float, str]] = {
    "norm of a row": ("query", QUERY, (3, 2), 2.0, rf"row 3 of {QUERY} has norm .+ in the base, and a rotation pres"),
    "norm of a column": ("c_attn", C_ATTN, (3, 2), 2.0, rf"row 2 of {C_ATTN} has norm "),
    "NaN": ("query", QUERY, (5, 2), float("nan"), rf"row 5 of {QUERY} has norm nan"),
    "a copy": ("query", "bert.pooler.dense.bias", (0,), 1.0, r"bert.pooler.dense.bias differs from what was written\."),
    "a new value": ("query", "classifier.weight", (0, 0), 1.0, r"classifier.weight differs from what was written\."),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_value_is_found(tmp_path: Path, what: str) -> None:
    target, name, place, by, message = CHANGES[what]
    plan, file = written(tmp_path, target, gpt2=target == "c_attn")
    check_file(plan, file)
    state = load_file(file)
    state[name][place] += by
    save_file(state, file, {"format": "pt"})
    with pytest.raises(FoldError, match=rf"^{file}: {message}.*Check the disk"):
        check_file(plan, file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_reflections_that_nearly_cancel_each_other_pass(tmp_path: Path, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "base").mkdir()
    weight = torch.randn(40, 64, dtype=torch.float64, generator=generator).to(dtype)
    save_file({"0.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1, width=64, r=63)
    near = torch.randn(64, 1, dtype=torch.float64, generator=generator)
    near = near + spread * torch.randn(64, 63, dtype=torch.float64, generator=generator)
    save_file({"base_model.model.0.hra_u": near}, adapter / "adapter_model.safetensors", {"format": "pt"})
    report = hra_fx.fold_checkpoint(tmp_path / "base", adapter, tmp_path / "out", columns=[], verify=True)
    assert 0 <= report.rounding < max(torch.finfo(dtype).eps / 2, 1e-15)
    folded = load_file(tmp_path / "out" / "model.safetensors")["0.weight"]
    assert relative_error(folded, dense_weight(weight, dense_q(near))) < max(torch.finfo(dtype).eps, 1e-12)


def test_a_file_that_was_copied_and_differs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_bytes(b"the same")
    check_copy(one, other)
    other.write_bytes(b"not same")
    with pytest.raises(FoldError, match=rf"^{other}: the copy differs from {one}\. Check the disk\.$"):
        check_copy(one, other)
