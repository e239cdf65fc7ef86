"""The folder of an adapter is written completely or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint.folders import BOTH, CONFIG, KEY, files_of_at_most, normal, saved, unwritten

from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, write
from hra_fx.checkpoint.weights import read
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path / "adapter")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert [stat.S_IMODE((tmp_path / "adapter" / name).stat().st_mode) for name in BOTH] == [wanted, wanted]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    weights = (saved(tmp_path) / WEIGHTS_NAME).stat()
    with open(tmp_path / WEIGHTS_NAME, "rb") as opened:
        saved(tmp_path, seed=1)
        assert torch.equal(read(tmp_path / WEIGHTS_NAME)[0][KEY], normal(6, 2, seed=1))
        assert (tmp_path / WEIGHTS_NAME).stat().st_ino != weights.st_ino
        assert len(opened.read()) == weights.st_size, "who reads the old file goes on reading it"
    write(tmp_path, HRAConfig(r=2).to_json_string(), {KEY: normal(6, 2)}, {})
    assert HRAConfig.from_pretrained(tmp_path).target_modules is None
    assert sorted(os.listdir(tmp_path)) == BOTH


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS_NAME).symlink_to(blob)
    saved(tmp_path / "adapter")
    assert blob.read_bytes() == b"shared"
    assert find(tmp_path / "adapter")


def test_no_tensors_and_metadata_that_is_no_text_are_refused(tmp_path: Path) -> None:
    assert "there are no tensors to save" in unwritten(saved(tmp_path), {})
    assert "safetensors cannot store this" in unwritten(tmp_path, {KEY: normal(6, 2)}, note="\ud800")


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match=r"is a file\. Give a folder to save in"):
        saved(file)
    with pytest.raises(CheckpointError, match="cannot write the adapter"):
        saved(file / "adapter")
    assert file.read_text() == "kept"


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    (saved(tmp_path) / WEIGHTS_NAME).unlink()
    (tmp_path / WEIGHTS_NAME / "inside").mkdir(parents=True)
    message = unwritten(tmp_path, {KEY: normal(6, 2, seed=1)}, HRAConfig(r=4).to_json_string())
    assert message.startswith(f"{tmp_path}: cannot write the adapter (")
    assert "The old files, if any, are unchanged" in message


SAVING = """
import sys, torch
from hra_fx.checkpoint.folder import write
folder, config = sys.argv[1:]
for number in range(10**9):
    write(folder, config + " " * (number % 2), {"hra_u": torch.full((500, 200), float(number))}, {})
    if number == 3:
        print("saving", flush=True)
"""


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    with files_of_at_most(20_000):
        message = unwritten(tmp_path, {KEY: torch.ones(100, 100)}, CONFIG + " ")
    assert message.startswith(f"{tmp_path}: cannot write the adapter ([Errno 27] File too large)")


def whole(folder: Path) -> float:
    """The value of all elements of the adapter in `folder`."""
    HRAConfig.from_pretrained(find(folder))
    values = read(folder / WEIGHTS_NAME)[0]["hra_u"].unique()
    assert values.numel() == 1
    return float(values)


@pytest.mark.slow
def test_a_reader_and_a_killed_writer_leave_a_complete_adapter(tmp_path: Path) -> None:
    for _ in range(3):
        command = [sys.executable, "-c", SAVING, str(tmp_path), CONFIG]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "saving\n"
        seen = {whole(tmp_path)}
        while len(seen) < 5:
            seen.add(whole(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert whole(tmp_path) >= max(seen)
