"""The weights of an adapter are read, or refused by name; its folder is written completely or not at all."""

from __future__ import annotations

import os
import re
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.folders import BOTH, CONFIG, KEY, files_of_at_most, normal, picture, saved, unwritten
from model.many import bert, config, ids, run, turn
from oracles import relative_error
from safetensors.torch import load_file, save
from torch import Tensor, nn

import hra_fx
from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, read, write
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError


def content(tensors: dict[str, Tensor] | None = None) -> bytes:
    return save(tensors or {KEY: normal(6, 3), "head.bias": normal(4)}, {"format": "pt", "note": "ours"})


def refused(path: Path, data: bytes | None = None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def test_every_dtype_is_read_and_integers_scalars_and_empty_tensors_too(path: Path) -> None:
    saved = {f"{dtype}.hra_u": normal(6, 3).to(dtype) for dtype in DTYPES}
    saved |= {"steps": torch.tensor(7), "none": torch.empty(0, 3), "mask": torch.tensor([True, False])}
    path.write_bytes(content(saved))
    tensors, metadata = read(path)
    assert tensors.keys() == saved.keys() and metadata == {"format": "pt", "note": "ours"}
    for key, tensor in saved.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key].double(), tensor.double())


def test_the_tensors_are_no_windows_into_the_file(path: Path) -> None:
    path.write_bytes(content())
    tensors, _ = read(path)
    kept = tensors[KEY].clone()
    with open(path, "r+b") as file:
        file.seek(0)
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensors[KEY], kept)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(content()[:5], id="cut in its length"),
        pytest.param(content()[:-1], id="cut in its tensors"),
        pytest.param(content() + b"\0", id="too long"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", id="a pointer of git-lfs"),
        pytest.param(struct.pack("<Q", 2**40) + b"{}", id="header too large"),
        pytest.param(struct.pack("<Q", 4) + b"null", id="a header that is no object"),
    ],
)
def test_another_format_is_refused(path: Path, data: bytes) -> None:
    message = refused(path, data)
    assert "truncated, damaged, or not a safetensors file" in message
    assert "Save or download it again." in message


def test_a_pickle_of_torch_is_refused_and_never_run(path: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({KEY: normal(6, 3), "trap": Trap()}, path)
    assert "not a safetensors file" in refused(path)
    assert not (tmp_path / "ran").exists()


def test_a_file_without_tensors_is_refused(path: Path) -> None:
    assert "the file has no tensors" in refused(path, save({}, {"format": "pt"}))
    assert "the file has no tensors" in refused(path, struct.pack("<Q", 2) + b"{}")


def test_a_missing_file_and_a_folder_cannot_be_read(path: Path, tmp_path: Path) -> None:
    assert "cannot read the file (No such file or directory" in refused(path)
    assert "cannot read the file" in refused(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_and_counted(path: Path, dtype: torch.dtype) -> None:
    vectors = normal(6, 3)
    vectors[1, 2] = vectors[4, 0] = float("nan")
    message = refused(path, content({"fine": normal(2), KEY: vectors.to(dtype)}))
    assert f"{KEY!r} has 2 of 18 values that are infinite or NaN" in message


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    table = normal(8, 6)
    tensors = {
        KEY: nn.Parameter(normal(6, 2)),
        "strided": table.mT,
        "whole": table,
        "part": table[2:4],
        "narrow": normal(3).bfloat16(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "steps": torch.tensor(3),
    }
    write(tmp_path / "new" / "folder", CONFIG, tensors, {"written_by": "a test", "format": "other"})
    folder = tmp_path / "new" / "folder"
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    found = load_file(folder / WEIGHTS_NAME)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert read(folder / WEIGHTS_NAME)[1] == {"format": "pt", "written_by": "a test"}
    assert (folder / CONFIG_NAME).read_text(encoding="utf-8") == CONFIG


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.tensor([1.0, float("nan"), float("inf")]), "'bad' has 2 of 3 values that are infinite or NaN"),
        (torch.empty(3, device="meta"), "'bad' is on the meta device and has no values"),
        (torch.eye(3).to_sparse(), "'bad' must be dense, got torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), "safetensors cannot store this"),
    ],
)
def test_a_tensor_that_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path: Path, tensor: Tensor, reason: str) -> None:
    tensors = {KEY: normal(6, 4), "bad": tensor}
    for folder in (saved(tmp_path), tmp_path / "new"):
        message = unwritten(folder, tensors, HRAConfig(r=4).to_json_string())
        assert message.startswith(f"{folder / WEIGHTS_NAME}: ")
        assert reason in message


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


def test_a_second_save_replaces_the_first_and_who_reads_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    saved(tmp_path)
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    with open(tmp_path / WEIGHTS_NAME, "rb") as opened:
        saved(tmp_path, seed=1)
        assert torch.equal(read(tmp_path / WEIGHTS_NAME)[0][KEY], normal(6, 2, seed=1))
        assert len(opened.read()) == size
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


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match=r"is a file\. Pass a folder to save in"):
        saved(file)
    with pytest.raises(CheckpointError, match="cannot write the adapter"):
        saved(file / "adapter")
    assert file.read_text() == "kept"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("other_is_there", [True, False])
def test_a_rename_that_fails_is_taken_back(tmp_path: Path, name: str, other_is_there: bool) -> None:
    saved(tmp_path)
    (other,) = set(BOTH) - {name}
    (tmp_path / name).unlink()
    (tmp_path / name / "inside").mkdir(parents=True)
    if not other_is_there:
        (tmp_path / other).unlink()
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


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors itself writes metadata in a random order."""
    tensors, entries = {"ä.hra_u": normal(6, 2), KEY: normal(5, 1)}, {name: name * 5 for name in ("z", "ü", "a", "b")}
    for i in range(5):
        write(tmp_path / str(i), "{}", tensors, entries)
    assert len({(tmp_path / str(i) / WEIGHTS_NAME).read_bytes() for i in range(5)}) == 1
    found, metadata = read(tmp_path / "0" / WEIGHTS_NAME)
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)
    assert metadata == {**entries, "format": "pt"}


# ---- the folder of a Trainer's checkpoint ----

SHAPES = {"transform": hra_fx.transform, "HRAModel": hra_fx.HRAModel}
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def model_of(shape: str) -> Any:
    model = SHAPES[shape](bert(), config("query", "value"))
    turn(model)
    return model


@pytest.mark.parametrize("name", ["checkpoint", "my-checkpoint-3", "checkpoint-3b"])
def test_folders_of_other_names_hold_adapters_alone(name: str, tmp_path: Path) -> None:
    model_of("transform").save_pretrained(tmp_path / name)
    assert sorted(file.name for file in (tmp_path / name).iterdir()) == ADAPTER


def test_a_whole_model_in_such_a_folder_is_left_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    bert().save_pretrained(folder)
    before = picture(folder)
    assert sorted(before) == ["config.json", "model.safetensors"]
    model = model_of("transform")
    message = (
        f"{folder}: the adapters were saved next to a full model. from_pretrained of diffusers, or of transformers "
        "without PEFT, loads that model without them: use hra_fx.load_adapter, or another folder."
    )
    with pytest.warns(hra_fx.HRAWarning, match=f"^{re.escape(message)}$") as caught:
        model.save_pretrained(folder)
    assert len(caught) == 1
    after = picture(folder)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == [*ADAPTER, "config.json", "model.safetensors"]
    opened = hra_fx.load_adapter(bert(), folder)
    assert relative_error(run(opened, ids()), run(model, ids())) < 1e-13
