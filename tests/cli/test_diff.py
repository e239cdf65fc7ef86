"""`diff`: values match those of whole tensors in float64; rotations are distinguished from other changes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake
from oracles import dense_product
from safetensors.torch import save_file
from torch import Tensor

from hra_fx.cli.tensor_change import change_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file(
        {name.replace("_", "."): tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def differences(a: Path, b: Path, *options: object) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in Answer("diff", a, b, "--json", *options).json["differences"]}


@pytest.fixture(scope="module")
def folded(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diff") / "folded"
    answer("fold", shelf / "my-model", shelf / "my-adapter", out)
    return out


def test_a_fold_turns_the_layers_of_its_adapter_and_nothing_else(shelf: Shelf, folded: Path) -> None:
    base, other = made.tensors(shelf / "my-model"), made.tensors(folded)
    found = differences(shelf / "my-model", folded)
    assert set(found) == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qv"}
    for name, entry in found.items():
        change = other[name].double() - base[name].double()
        assert entry["how"] == "rotated"
        assert entry["relative"] == pytest.approx(float(change.norm() / base[name].double().norm()))
        assert entry["largest"] == pytest.approx(float(change.abs().max()))
        lengths = [tensors[name].double().norm(dim=1) for tensors in (base, other)]
        assert entry["lengths"] == pytest.approx(float(((lengths[1] - lengths[0]) / lengths[0]).abs().max()))
        assert (entry["shapes"], entry["dtypes"]) == ([list(base[name].shape)] * 2, ["BF16"] * 2)


def test_the_way_back_is_rounding_and_a_tolerance_takes_it_for_equal(
    shelf: Shelf, folded: Path, tmp_path: Path
) -> None:
    answer("unfold", folded, shelf / "my-adapter", tmp_path / "back")
    found = differences(shelf / "my-model", tmp_path / "back")
    assert {entry["how"] for entry in found.values()} == {"rounding"}
    near = answer("diff", shelf / "my-model", tmp_path / "back", "--tolerance", "0.01")
    assert near.startswith("21 tensors, none differs by more than 1.0%\n")
    far = Answer("diff", shelf / "my-model", folded, "--tolerance", "0.01")
    assert (far.code, far.out.partition("\n")[0]) == (1, "4 of 21 tensors differ by more than 1.0%")


@pytest.mark.parametrize(
    ("dtype", "rows", "width"),
    [
        *((dtype, 40, 8) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
        (torch.bfloat16, 1100, 1024),  # compared in several blocks
    ],
)
def test_rotations_are_told_from_other_changes_of_any_size(dtype: torch.dtype, rows: int, width: int) -> None:
    weight = normal(rows, width).to(dtype)
    q = dense_product(normal(width, 3, seed=1))
    turned = (weight.double() @ q).to(dtype)
    assert change_of(weight, turned).how == "rotated"
    assert change_of(weight.T, turned.T).how == "rotated (columns)"
    for size in (0.1, 2.0):
        other = (weight.double() + size * normal(rows, width, seed=2)).to(dtype)
        assert change_of(weight, other).how == "changed", size
    for size in (3, 10, 30, 100, 1000):
        other = (weight.double() + size * torch.finfo(dtype).eps * normal(rows, width, seed=2)).to(dtype)
        assert change_of(weight, other).how in ("changed", "small"), size
    assert change_of(weight, (weight.double() * 1.05).to(dtype)).how == "changed"


@pytest.mark.parametrize(("dtype", "seen", "unseen"), [(torch.bfloat16, 1.0, 0.2), (torch.float32, 1e-3, 3e-5)])
def test_small_rotations(dtype: torch.dtype, seen: float, unseen: float) -> None:
    """Two vectors that are half of the angle apart; smaller rotations cannot be told from other small changes."""
    weight, vector = normal(40, 64).to(dtype), normal(64, 1, seed=1)
    across = normal(64, 1, seed=3)
    across -= vector * (vector.T @ across) / vector.square().sum()
    for angle, how in ((seen, "rotated"), (unseen, "small")):
        other = vector / vector.norm() + angle / 2 * across / across.norm()
        q = dense_product(torch.cat([vector, other], dim=1))
        assert change_of(weight, (weight.double() @ q).to(dtype)).how == how, angle


@pytest.mark.parametrize(
    ("a", "b", "how"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "changed"),
        (torch.tensor([True]), torch.tensor([False]), "changed"),
        (torch.tensor(1.0), torch.tensor(1.5), "changed"),
        (torch.zeros(2, 2), torch.ones(2, 2), "changed"),
        (torch.zeros(0, 4), torch.zeros(0, 4), "equal"),
        (torch.tensor([math.nan, 1]), torch.tensor([math.nan, 1]), "equal"),
        (torch.tensor([math.nan, 1]), torch.tensor([2.0, 1]), "not finite"),
        (torch.tensor([math.inf, 1]), torch.tensor([math.inf, 1]), "equal"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "equal"),
        (torch.ones(3, 4, 2, 2), torch.ones(3, 4, 2, 2).neg(), "rotated"),
        (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.complex64) * 1j, "changed"),
        (torch.ones(4).to(torch.float8_e4m3fn), torch.full((4,), 2.0).to(torch.float8_e4m3fn), "changed"),
    ],
)
def test_tensors_of_any_sort(a: Tensor, b: Tensor, how: str) -> None:
    assert change_of(a, b).how == how


def test_keys_shapes_and_dtypes(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", same=normal(2), left=normal(3), shape=normal(2, 3), dtype=torch.ones(2))
    b = saved(tmp_path / "b", same=normal(2), right=normal(3), shape=normal(3, 2), dtype=torch.ones(2).bfloat16())
    found = differences(a, b)
    assert {name: entry["how"] for name, entry in found.items()} == {
        "left": "only in A",
        "right": "only in B",
        "shape": "shape",
        "dtype": "dtype",
    }
    assert found["left"]["shapes"] == [[3], None] and found["left"]["relative"] is None
    text = Answer("diff", a, b, columns=60).out
    assert "shape 2x3 / 3x2" in text and "dtype F32 / BF16" in text


def test_sharded_against_whole_and_one_file(tmp_path: Path) -> None:
    sharded = made.linear_stack(tmp_path / "sharded")
    whole = tmp_path / "whole.safetensors"
    save_file(made.tensors(sharded), whole)
    assert Answer("diff", sharded, whole).code == 0
    assert Answer("diff", whole, whole).code == 0


def test_folders_in_a_pipeline_and_variants(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for part in ("unet", "vae"):
            made.linear_stack(tmp_path / name / part, layers=1)
        save_file({"0.weight": torch.ones(1)}, tmp_path / name / "vae" / "model.fp16.safetensors")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "b" / "vae" / "model.fp16.safetensors")
    assert list(differences(tmp_path / "a", tmp_path / "b")) == ["vae/model.fp16:0.weight"]


def test_a_side_that_is_missing(shelf: Shelf, tmp_path: Path) -> None:
    said = mistake("diff", shelf / "my-model", tmp_path / "nothing")
    assert said == f"{tmp_path / 'nothing'}: no such folder or file."
    assert "no .safetensors files found." in mistake("diff", shelf / "my-model", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "only safetensors files are read." in mistake("diff", shelf / "my-model", tmp_path)


def test_a_damaged_file(shelf: Shelf, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copyfile(shelf / "my-model" / "model.safetensors", file)
    file.write_bytes(file.read_bytes()[:-2])
    assert "model.safetensors: truncated, damaged" in mistake("diff", shelf / "my-model", tmp_path)
    file.write_bytes(b"no header")
    assert "model.safetensors: truncated, damaged" in mistake("diff", file, shelf / "my-model")
