"""`fold` and `unfold` write the same files as the functions of the library."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, picture, usage
from oracles import dense_product
from safetensors.torch import load_file

import hra_fx


def test_two_adapters_in_their_order(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "folded"
    text = answer("fold", shelf / "my-model", shelf / "my-adapter", shelf / "second", out, "--verify")
    assert text.startswith(f"{out}: 6 tensors rotated")
    assert "verified: row norms are preserved" in text
    base, folded = made.tensors(shelf / "my-model"), made.tensors(out)
    chains = [load_file(shelf / name / "adapter_model.safetensors") for name in ("my-adapter", "second")]
    for name, tensor in base.items():
        q = torch.eye(tensor.shape[-1], dtype=torch.float64)
        for chain in chains:
            key = f"base_model.model.{name.removesuffix('.weight')}.hra_u"
            q = q @ dense_product(chain[key]) if key in chain else q
        wanted = (tensor.double() @ q).to(tensor.dtype) if tensor.dim() > 1 else tensor
        torch.testing.assert_close(folded[name], wanted, rtol=2**-7, atol=1e-6)


def test_the_same_folder_as_by_the_function_and_the_way_back(shelf: Shelf, tmp_path: Path) -> None:
    done = Answer("fold", shelf / "my-model", shelf / "my-adapter", tmp_path / "folded", "--json", "-q")
    hra_fx.fold_checkpoint(shelf / "my-model", shelf / "my-adapter", tmp_path / "other", progress=False)
    assert picture(tmp_path / "folded") == picture(tmp_path / "other")
    assert done.json["folder"] == (tmp_path / "folded").as_posix() and len(done.json["rotated"]) == 4
    back = Answer("unfold", tmp_path / "folded", shelf / "my-adapter", tmp_path / "back", "--json", "--verify")
    assert (back.code, back.json["verified"]) == (0, True)
    hra_fx.unfold_checkpoint(tmp_path / "other", shelf / "my-adapter", tmp_path / "plain", progress=False)
    assert picture(tmp_path / "back") == picture(tmp_path / "plain")


def test_a_part_of_a_pipeline(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "pipe" / "unet", layers=1)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    words = ("fold", tmp_path / "pipe", adapter, tmp_path / "out")
    said = mistake(*words)
    assert "no subfolder with an adapter is named like a part of the pipeline" in said
    assert said.endswith("(--part unet).")
    assert "out/unet" not in answer(*words, "--part", "unet")
    assert picture(tmp_path / "out").keys() == picture(tmp_path / "pipe").keys()


@pytest.mark.parametrize(("options", "turned"), [(["--rows"], False), (["--columns", "0"], True)])
def test_how_a_square_weight_lies(tmp_path: Path, options: list[str], turned: bool) -> None:
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    save_file({"0.weight": weight}, tmp_path / "base" / "model.safetensors")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    words = ("fold", tmp_path / "base", adapter, tmp_path / "out")
    assert "Pass columns=[] (--rows) if every weight is (out, in), or columns=[names] (--columns NAME)" in mistake(
        *words
    )
    answer(*words, *options)
    q = dense_product(load_file(adapter / "adapter_model.safetensors")["base_model.model.0.hra_u"])
    wanted = q.T @ weight.double() if turned else weight.double() @ q
    torch.testing.assert_close(made.tensors(tmp_path / "out")["0.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_errors_and_warnings_of_the_library_are_printed(shelf: Shelf, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    shutil.copytree(shelf / "my-model", tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    words = ("fold", tmp_path / "base", shelf / "my-adapter", out)
    assert mistake(*words) == (
        f"{out}: the output folder is not empty. Choose another folder, or overwrite=True (--overwrite)."
    )
    assert picture(out) == {"mine.txt": b"mine"}
    done = Answer(*words, "--overwrite")
    assert done.code == 0 and "mine.txt" not in picture(out)
    assert done.err.startswith(f"warning: {out}: pytorch_model.bin still contain the base model's weights.")
    assert "Missing argument 'ADAPTER'" in usage("fold", tmp_path / "base", out)
