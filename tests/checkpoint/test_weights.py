"""Weights: files of safetensors and PEFT are read, PEFT reads ours, and damaged files are refused by name."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_numpy
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hra_fx.checkpoint.folder import WEIGHTS_NAME, read, write
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError

KEY = "base_model.model.0.hra_u"
CONFIG = HRAConfig(r=2, target_modules=["0"]).to_json_string()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


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
    saved = {f"{dtype}.hra_u": normal(6, 3, dtype=dtype) for dtype in DTYPES}
    saved |= {"steps": torch.tensor(7), "none": torch.empty(0, 3), "mask": torch.tensor([True, False])}
    path.write_bytes(content(saved))
    tensors, _ = read(path)
    for key, tensor in saved.items():
        assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key].double(), tensor.double())


def test_tensors_and_metadata_are_what_is_in_the_file(path: Path) -> None:
    path.write_bytes(content())
    tensors, metadata = read(path)
    wanted = load_numpy(content())
    assert tensors.keys() == wanted.keys()
    assert all(np.array_equal(tensors[key].numpy(), wanted[key]) for key in wanted)
    assert metadata == {"format": "pt", "note": "ours"}


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
        pytest.param(content()[:40], id="cut in its header"),
        pytest.param(content()[:-1], id="cut in its tensors"),
        pytest.param(content() + b"\0", id="too long"),
        pytest.param(b"This is a text, and no tensor is in it.\n", id="text"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", id="a pointer of git-lfs"),
        pytest.param(b"<!DOCTYPE html><html></html>", id="an error page"),
        pytest.param(pickle.dumps({KEY: [1.0, 2.0]}), id="pickle"),
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_vectors_that_are_not_floating_are_refused(path: Path, dtype: torch.dtype) -> None:
    message = refused(path, content({KEY: torch.ones(6, 3, dtype=dtype)}))
    assert f"{KEY!r} must have a floating-point dtype, got {dtype}" in message


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


def test_the_callers_tensors_are_not_touched(tmp_path: Path) -> None:
    vectors = nn.Parameter(normal(2, 6).mT)
    write(tmp_path, CONFIG, {KEY: vectors, "again": vectors}, {})
    assert vectors.requires_grad
    assert vectors.stride() == (1, 6)
    assert torch.equal(vectors, normal(2, 6).mT)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.tensor([1.0, float("nan"), float("inf")]), "'bad' has 2 of 3 values that are infinite or NaN"),
        (torch.tensor([float("nan")], dtype=torch.float8_e4m3fn), "'bad' has 1 of 1 values"),
        (nn.Parameter(torch.tensor([-float("inf")]).bfloat16()), "'bad' has 1 of 1 values"),
        (torch.tensor([complex("nan"), 1j]), "'bad' has 1 of 2 values"),
        (torch.empty(3, device="meta"), "'bad' is on the meta device and has no values"),
        (torch.eye(3).to_sparse(), "'bad' must be dense, got torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex128), "safetensors cannot store this"),
    ],
)
def test_a_tensor_that_cannot_be_saved_leaves_the_folder_as_it_was(tmp_path: Path, tensor: Tensor, reason: str) -> None:
    write(tmp_path, CONFIG, {KEY: normal(6, 2)}, {})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(CheckpointError) as caught:
            write(folder, HRAConfig(r=4).to_json_string(), {KEY: normal(6, 4), "bad": tensor}, {})
        assert str(caught.value).startswith(f"{folder / WEIGHTS_NAME}: ")
        assert reason in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
