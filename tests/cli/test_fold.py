"""`fold` and `unfold` write the same files as the functions of the library."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage

import hra_fx


def test_the_same_folder_as_by_the_function_and_the_way_back(shelf: Shelf, tmp_path: Path) -> None:
    adapters = [shelf / "my-adapter", shelf / "second"]
    done = Answer("fold", shelf / "my-model", *adapters, tmp_path / "folded", "--json", "-q", "--rows")
    hra_fx.fold_checkpoint(shelf / "my-model", adapters, tmp_path / "other", progress=False)
    assert made.picture(tmp_path / "folded") == made.picture(tmp_path / "other")
    assert done.json["folder"] == (tmp_path / "folded").as_posix() and len(done.json["rotated"]) == 6
    back = Answer("unfold", tmp_path / "folded", *adapters, tmp_path / "back", "--json", "--verify")
    assert (back.code, back.json["verified"]) == (0, True)
    hra_fx.unfold_checkpoint(tmp_path / "other", adapters, tmp_path / "plain", progress=False)
    assert made.picture(tmp_path / "back") == made.picture(tmp_path / "plain")
    said = mistake("fold", shelf / "my-model", *adapters, tmp_path / "columns", "--columns", "q_proj")
    assert "is (out, in) according to config.json, but (in, out) according to columns (--columns, --rows)" in said


def test_a_part_of_a_pipeline(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "pipe" / "unet", layers=1)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    words = ("fold", tmp_path / "pipe", adapter, tmp_path / "out")
    said = mistake(*words)
    assert "no subfolder with an adapter is named like a part of the pipeline" in said
    assert said.endswith("(--part unet).")
    assert "out/unet" not in answer(*words, "--part", "unet")
    assert made.picture(tmp_path / "out").keys() == made.picture(tmp_path / "pipe").keys()


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
    assert made.picture(out) == {"mine.txt": b"mine"}
    done = Answer(*words, "--overwrite")
    assert done.code == 0 and "mine.txt" not in made.picture(out)
    assert done.err.startswith(f"warning: {out}: pytorch_model.bin still contain the base model's weights.")
    assert "Missing argument 'ADAPTER'" in usage("fold", tmp_path / "base", out)
