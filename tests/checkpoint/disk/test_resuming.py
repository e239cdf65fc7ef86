"""A fold that is killed, or fails on a full disk, leaves the base unchanged and resumes when it is repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from checkpoint.folders import files_of_at_most
from safetensors.torch import save_file

import hra_fx
from hra_fx.checkpoint.disk.staging_dir import StagingDir
from hra_fx.errors import CheckpointError, FoldError

LAYERS = 24
KILLED = Path(__file__).with_name("killed.py")


def prepared(tmp_path: Path, layers: int = 4, width: int = 64) -> tuple[Path, Path, dict[str, bytes]]:
    """A base, an adapter, and the files of an undisturbed fold."""
    base = made.linear_stack(tmp_path / "base", layers=layers, width=width)
    (base / "tokenizer.json").write_text("x" * 100)
    adapter = made.stack_adapter(tmp_path / "adapter", layers=layers, width=width)
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "undisturbed", columns=[])
    return base, adapter, made.picture(tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    base, adapter, due = prepared(tmp_path, LAYERS, 96)
    before = made.picture(base)
    arguments = [sys.executable, "-W", "ignore", str(KILLED), str(base), str(adapter), str(tmp_path / "runs")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["runs"] == 20 and told["killed"] >= 10 and told["resumed"] >= 2, told
    assert made.picture(base) == before
    for i in range(20):
        assert made.picture(tmp_path / "runs" / str(i) / "out") == due
        assert [path.name for path in (tmp_path / "runs" / str(i)).iterdir()] == ["out"]


def test_a_disk_that_refuses_leaves_nothing_half_written_and_the_call_goes_on(tmp_path: Path) -> None:
    base, adapter, due = prepared(tmp_path)
    big = {"3.weight": torch.ones(400, 64), "3.bias": torch.ones(400)}
    save_file(big, base / "model-00004-of-00004.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with files_of_at_most(50_000), pytest.raises(CheckpointError) as caught:
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: cannot write the result ([Errno 27] File too large). The output folder is unchanged. "
        "Free some space, check the disk, or choose another output folder. Finished files are kept in "
        f"{tmp_path / '.out.partial'}: repeat the call to resume, or delete that folder."
    )
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / ".out.partial" / "part").exists()
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[], verify=True)
    assert report.reused == 3 and "resumed: 3 files finished earlier" in str(report)
    assert report.rounding > 0 and len(report.rotated) == 4
    after = made.picture(tmp_path / "out")
    assert [name for name in due if after[name] != due[name]] == ["model-00004-of-00004.safetensors"]
    assert not (tmp_path / ".out.partial").exists()


def test_a_base_that_is_larger_than_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    """A file with a hole, of 2 TiB."""
    base, adapter, _ = prepared(tmp_path)
    size = 1 << 41
    text = json.dumps({"9.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with open(base / "x.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    with pytest.raises(CheckpointError, match=r"bytes are needed, but only [\d,]+ are free\. Free some space, or"):
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def interrupted(base: Path, adapter: Path, out: Path) -> Path:
    """Leave behind what a call leaves that is stopped when most is done."""
    with open(base / "zzz", "wb") as file:
        file.truncate(2_000_000)
    with files_of_at_most(1_000_000), pytest.raises(CheckpointError, match="cannot write the result"):
        hra_fx.fold_checkpoint(base, adapter, out, columns=[])
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize("changed", ["adapter", "base"])
def test_files_of_other_inputs_are_not_reused(tmp_path: Path, changed: str) -> None:
    base, adapter, _ = prepared(tmp_path)
    other = made.stack_adapter(tmp_path / "other", layers=4, width=64, seed=9)
    partial = interrupted(base, other if changed == "adapter" else adapter, tmp_path / "out")
    assert len(list((partial / "content").iterdir())) == 6
    (base / "zzz").unlink()
    if changed == "base":
        state = made.tensors(base)
        first = base / "model-00001-of-00004.safetensors"
        save_file({key: state[key] + 1 for key in ("0.weight", "0.bias")}, first, {"format": "pt"})
    assert hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[]).reused == 0
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "again", columns=[])
    assert made.picture(tmp_path / "out") == made.picture(tmp_path / "again")


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    base, adapter, due = prepared(tmp_path)
    with StagingDir(tmp_path / "out").locked({}):
        # The base may be readable by the user alone.
        assert (tmp_path / ".out.partial").stat().st_mode & 0o777 == 0o700
    with StagingDir(tmp_path / "out").locked({}), pytest.raises(CheckpointError) as caught:
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert str(caught.value) == (
        f"{tmp_path / '.out.partial'}: in use by another process. Wait until it has finished, or stop it."
    )
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out", columns=[])
    assert made.picture(tmp_path / "out") == due


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_around_the_two_renames(tmp_path: Path, moment: str) -> None:
    """The moments that a random kill seldom meets: the old folder is moved away, and the new one gets its name."""
    base, adapter, expected = prepared(tmp_path)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    interrupted(base, adapter, out)
    out.mkdir()
    (out / "old").write_text("old")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "whole", columns=[])
    (tmp_path / "whole" / "zzz").rename(partial / "content" / "zzz")
    if moment != "before":
        os.replace(out, partial / "replaced")
    if moment == "after":
        os.replace(partial / "content", out)
        with pytest.raises(CheckpointError, match="the output folder is not empty"):
            hra_fx.fold_checkpoint(base, adapter, out, columns=[])
    report = hra_fx.fold_checkpoint(base, adapter, out, columns=[], overwrite=True)
    after = made.picture(out)
    assert {name: after[name] for name in expected} == expected and "old" not in after
    assert report.reused == (0 if moment == "after" else 7) and not partial.exists()


def test_stopped_while_renaming_and_then_refused(tmp_path: Path) -> None:
    """The folder that made room comes back, also where another call follows."""
    base, adapter, _ = prepared(tmp_path)
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    (partial / "content").mkdir(parents=True)
    (partial / "replaced").mkdir()
    (partial / "replaced" / "old").write_text("old")
    state = made.tensors(base)
    state["0.weight"][0, 0] = float("nan")
    names = ("0.weight", "0.bias")
    save_file({key: state[key] for key in names}, base / "model-00001-of-00004.safetensors", {"format": "pt"})
    with pytest.raises(FoldError):
        hra_fx.fold_checkpoint(base, adapter, out, columns=[])
    assert made.picture(out) == {"old": b"old"}


def test_interrupted_once_the_result_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, expected = prepared(tmp_path)
    out = tmp_path / "out"

    def stop(staging: StagingDir) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(StagingDir, "discard", stop)
        hra_fx.fold_checkpoint(base, adapter, out, columns=[])
    note = f"{out}: The result is complete. Delete the leftover {tmp_path / '.out.partial'}."
    assert caught.value.__notes__ == [note]
    assert made.picture(out) == expected
    assert hra_fx.fold_checkpoint(base, adapter, out, columns=[], overwrite=True).reused == 0
    assert made.picture(out) == expected and not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    base, adapter, _ = prepared(tmp_path, LAYERS, 96)
    code = (
        "import signal, sys, hra_fx; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "hra_fx.fold_checkpoint(*sys.argv[1:], columns=[])"
    )
    with open(base / "zzz", "wb") as file:
        file.truncate(1 << 32)  # a hole, that takes a while to copy
    arguments = [sys.executable, "-c", code, str(base), str(adapter), str(tmp_path / "out")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".out.partial" / "content"
    while process.poll() is None and not (partial / "tokenizer.json").exists():
        pass
    process.send_signal(2)
    told = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in told
    assert f"kept in {tmp_path / '.out.partial'}: repeat the call to resume" in told
    assert not (tmp_path / "out").exists()
