"""`inspect`, `fold` and `convert` do what the functions of the library do."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoints import adapter_of, picture
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage
from diffusion_pipelines import unet
from moe_models import TARGETS, built
from safetensors.torch import load_file, save_file

import hra_fx

# ---- inspect ----


def inspected(*words: object) -> Any:
    return Answer("inspect", *words, "--json").json


@pytest.mark.parametrize("name", ["my-adapter", "orthonormal", "experts"])
def test_inspect_shows_the_values_of_the_report(shelf: Shelf, name: str, tmp_path: Path) -> None:
    model, adapter = copy.deepcopy(shelf.model), shelf / name
    if name == "experts":
        model = built("gpt_oss", torch.float32)
        adapter = adapter_of(model, tmp_path, target_parameters=TARGETS)
    rows = hra_fx.report(hra_fx.load_adapter(model, adapter)).to_dicts()
    found = {layer["path"]: layer for layer in inspected(adapter)["rows"]}
    assert found.keys() == {row["path"] for row in rows}
    for row in rows:
        for field in ("d", "r", "parameters", "angle", "mean_angle"):
            assert found[row["path"]][field] == pytest.approx(row[field], rel=1e-4), field
    if name == "orthonormal":
        assert "apply_GS        True\n" in answer("inspect", adapter)


def test_inspect_reads_an_adapter_of_peft(shelf: Shelf, tmp_path: Path) -> None:
    config = peft.HRAConfig(r=4, target_modules=["q_proj"], init_weights=False, modules_to_save=["lm_head"])
    model = copy.deepcopy(shelf.model)
    model.name_or_path = str(shelf / "my-model")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    look = inspected(tmp_path)
    assert look["base_model_name_or_path"] == str(shelf / "my-model")
    assert (look["r"], look["also_saved"]) == (4, ["lm_head.weight"])
    assert "also_saved               lm_head.weight\n" in answer("inspect", tmp_path)


def test_inspect_sorts_layers_by_number(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(12)))
    folder = adapter_of(model, tmp_path, *map(str, range(12)))
    assert [layer["path"] for layer in inspected(folder)["rows"]] == [str(i) for i in range(12)]


# ---- fold ----


def test_fold_writes_the_folder_of_the_function(shelf: Shelf, tmp_path: Path) -> None:
    adapters = [shelf / "my-adapter", shelf / "second"]
    done = Answer("fold", shelf / "my-model", *adapters, tmp_path / "folded", "--json")
    hra_fx.fold_checkpoint(shelf / "my-model", adapters, tmp_path / "other")
    assert picture(tmp_path / "folded") == picture(tmp_path / "other")
    assert (done.code, done.err, done.json["folder"]) == (0, "", (tmp_path / "folded").as_posix())
    assert len(done.json["rotated"]) == 6


def test_errors_and_warnings_of_the_library_are_printed(shelf: Shelf, tmp_path: Path) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    shutil.copytree(shelf / "my-model", base)
    save_file({**load_file(base / "model.safetensors"), "mtp": torch.ones(2)}, base / "model.safetensors")
    words = ("fold", base, shelf / "my-adapter", out)
    assert mistake(*words).startswith(f"{out}: the output folder is not empty.")
    (out / "mine.txt").unlink()
    done = Answer(*words)
    assert done.code == 0
    assert done.err.startswith(f"warning: {out}: has no mtp, which the class of the model does not use, or ties to")
    swapped = mistake("fold", shelf / "my-adapter", base, tmp_path / "new")
    assert swapped.startswith(f"{shelf / 'my-adapter'}/config.json: no such file. Pass the folder of a transformers")


# ---- convert ----

TAKEN = "already exists. The last path is the output: name a new one, or delete it."


def test_an_output_folder_with_other_files(shelf: Shelf, tmp_path: Path) -> None:
    words = ("convert", shelf / "my-adapter", tmp_path, "--to", "lora", "--base", shelf / "my-model")
    (tmp_path / "notes.txt").write_text("mine")
    assert mistake(*words) == f"{tmp_path}: {TAKEN}"
    assert mistake(words[0], words[1], tmp_path / "notes.txt", *words[3:]).endswith(f"notes.txt: {TAKEN}")
    assert mistake(words[0], words[1], shelf / "second", *words[3:]) == f"{shelf / 'second'}: {TAKEN}"  # OUT is missing
    assert picture(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("part", "out", "fields"),
    [
        ("", "lora", {"rank": 2, "dtype": "bfloat16"}),
        ("", "lora.gguf", {"dtype": "float16"}),
        ("unet", "lora", {}),
    ],
)
def test_convert_writes_the_files_of_the_function(
    shelf: Shelf, part: str, out: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT's format, GGUF, and the format of diffusers for one of its models."""
    base, adapters, model = shelf / "my-model", [shelf / "my-adapter", shelf / "second"], copy.deepcopy(shelf.model)
    model.name_or_path = str(base)
    if part:
        model, base = unet(), tmp_path / part
        model.save_pretrained(base)
        adapters = [adapter_of(model, tmp_path / "adapter", "to_q", "conv1")]
    to = ["--to", "gguf" if out.endswith("gguf") else "lora", "--base", base, "--json"]
    (tmp_path / "command").mkdir()
    options = [word for name, value in fields.items() for word in (f"--{name}", value)]
    done = Answer("convert", *adapters, tmp_path / "command" / out, *to, *options)
    names = "ab"[: len(adapters)]
    for name, folder in zip(names, adapters, strict=True):
        hra_fx.load_adapter(model, folder, name)
    result = hra_fx.save_as_lora(model, tmp_path / "function" / out, list(names), **fields)
    assert (done.code, done.err, done.json["rank"], done.json["format"]) == (0, "", result.rank, result.format)
    assert done.json["errors"] == result.errors
    files = picture(tmp_path / "command"), picture(tmp_path / "function")
    assert files[0].keys() == files[1].keys()
    assert all(len(data) == len(files[1][name]) for name, data in files[0].items() if "config" not in name)


#: Arguments after the adapter and the output folder -> a part of the usage error.
WRONG: dict[tuple[str, ...], str] = {
    ("out", "--to", "peft", "--base", "x"): "'peft' is not one of 'lora', 'gguf'.",
    ("out", "--to", "lora"): "Missing option '--base'",
    ("out.gguf", "--to", "lora", "--base", "x"): "Invalid value for OUT: --to lora writes a folder",
    ("out", "--to", "gguf", "--base", "x"): "Invalid value for OUT: --to gguf writes a .gguf file",
    ("out", "--to", "lora", "--base", "x", "--dtype", "int8"): "'int8' is not one of 'float32', 'float16', 'bfloat16'.",
}


def test_a_missing_output_is_named() -> None:
    for words in (("fold", "base", "adapter"), ("convert", "adapter", "--to", "lora", "--base", "x")):
        assert "Missing argument 'ADAPTER' or 'OUT'." in usage(*words)


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_options_that_do_not_fit_together(shelf: Shelf, words: tuple[str, ...]) -> None:
    assert WRONG[words] in usage("convert", shelf / "my-adapter", *words)
