"""`inspect`, `fold` and `visualize` do what the functions of the library do."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake
from moe_models import TARGETS, built

import hra_fx
from hra_fx.cli.building import build


def inspected(*words: object) -> Any:
    return Answer("inspect", *words, "--json").json


@pytest.mark.parametrize("name", ["my-adapter", "orthonormal", "experts"])
def test_inspect_shows_the_values_of_the_report(shelf: Shelf, name: str, tmp_path: Path) -> None:
    model, adapter = copy.deepcopy(shelf.model), shelf / name
    if name == "experts":
        model = built("gpt_oss", torch.float32)
        adapter = made.adapter_of(model, tmp_path, target_parameters=TARGETS, target_modules=None)
    rows = hra_fx.report(hra_fx.load_adapter(model, adapter)).to_dicts()
    found = {layer["path"]: layer for layer in inspected(adapter)["layers"]}
    assert found.keys() == {row["path"] for row in rows}
    for row in rows:
        for field in ("d", "r", "parameters", "rotation", "angle", "mean_angle"):
            assert found[row["path"]][field] == pytest.approx(row[field], rel=1e-4), field
    if name == "orthonormal":
        assert "r = 2, orthonormalized by Gram-Schmidt, and 2 frozen anchor vectors" in answer("inspect", adapter)


def test_inspect_reads_an_adapter_of_peft(shelf: Shelf, tmp_path: Path) -> None:
    config = peft.HRAConfig(r=4, target_modules=["q_proj"], init_weights=False, modules_to_save=["lm_head"])
    model = copy.deepcopy(shelf.model)
    model.name_or_path = str(shelf / "my-model")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    look = inspected(tmp_path)
    assert look["written_by"] == f"PEFT {peft.__version__}"
    assert look["base_model"] == str(shelf / "my-model")
    assert (look["r"], look["anchor"], look["saved"]) == (4, 0, ["lm_head.weight"])
    assert "also trained  lm_head.weight" in answer("inspect", tmp_path)


def test_inspect_sorts_layers_by_number(tmp_path: Path) -> None:
    folder = made.stack_adapter(tmp_path / "stack", layers=12)
    assert [layer["path"] for layer in inspected(folder)["layers"]] == [str(i) for i in range(12)]


def test_inspect_names_the_adapters_in_subfolders(shelf: Shelf) -> None:
    message = mistake("inspect", shelf.folder)
    assert "There are adapters in the subfolders 'my-adapter', 'orthonormal', 'second': pass the path of" in message
    assert mistake("inspect", shelf / "my-model").endswith("to see its layers, run hra-fx match.")


def test_fold_writes_the_folder_of_the_function(shelf: Shelf, tmp_path: Path) -> None:
    adapters = [shelf / "my-adapter", shelf / "second"]
    done = Answer("fold", shelf / "my-model", *adapters, tmp_path / "folded", "--json", "-q", "--rows", "--verify")
    hra_fx.fold_checkpoint(shelf / "my-model", adapters, tmp_path / "other", progress=False)
    assert made.picture(tmp_path / "folded") == made.picture(tmp_path / "other")
    assert done.json["folder"] == (tmp_path / "folded").as_posix()
    assert done.json["verified"] and len(done.json["rotated"]) == 6
    Answer("fold", shelf / "my-model", *adapters, tmp_path / "columns", "-q", "--columns", "q_proj")  # known already
    assert made.picture(tmp_path / "columns") == made.picture(tmp_path / "other")


def test_fold_takes_a_part_of_a_pipeline(tmp_path: Path) -> None:
    made.linear_stack(tmp_path / "pipe" / "unet", layers=1)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    adapter = made.stack_adapter(tmp_path / "adapter", layers=1)
    words = ("fold", tmp_path / "pipe", adapter, tmp_path / "out")
    assert mistake(*words).endswith("(--part unet).")
    assert "out/unet" not in answer(*words, "--part", "unet")
    assert made.picture(tmp_path / "out").keys() == made.picture(tmp_path / "pipe").keys()


def test_errors_and_warnings_of_the_library_are_printed(shelf: Shelf, tmp_path: Path) -> None:
    out, base = tmp_path / "out", tmp_path / "base"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    shutil.copytree(shelf / "my-model", base)
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    words = ("fold", base, shelf / "my-adapter", out)
    assert mistake(*words).startswith(f"{out}: the output folder is not empty.")
    assert made.picture(out) == {"mine.txt": b"mine"}
    done = Answer(*words, "--overwrite")
    assert done.code == 0 and "mine.txt" not in made.picture(out)
    assert done.err.startswith(f"warning: {out}: pytorch_model.bin still contain the base model's weights.")
    swapped = mistake("fold", shelf / "my-adapter", base, tmp_path / "new")
    assert swapped.startswith(f"{base / 'adapter_config.json'}: no such file. The folder contains a model, not an ")
    assert swapped.endswith("fold and load_adapter take the model first; to see its layers, run hra-fx match.")


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("html", {"heat": "mean_angle"}),
        ("svg", {"focus": "model.layers.0", "depth": 1, "heat": "mean_angle"}),
        ("html", {"heat": "share"}),
    ],
)
def test_a_picture_is_that_of_the_function(shelf: Shelf, tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    """`--heat share` reads the weights on disk. Without them, only the measures of a weight are unknown."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    out = tmp_path / f"a.{ending}"
    done = Answer("visualize", shelf / "my-model", out, "--adapter", shelf / "my-adapter", *words, "--json")
    assert done.json == {"file": str(out)}
    model = hra_fx.load_adapter(copy.deepcopy(shelf.model), shelf / "my-adapter")
    wanted = hra_fx.visualize(model, tmp_path / f"b.{ending}", **options)
    unknown = "" if options["heat"] == "share" else r'"(?:share|weight_change)":(\{[^{}]*\}|\[[^\]]*\]|[^,}\]]*)'
    drawn, due = (re.sub(unknown, "", file.read_text()) for file in (out, wanted))
    assert drawn == due


def test_weights_of_timm_are_loaded(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    torch.testing.assert_close(build(tmp_path, weights=True)[0].state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.xyz"], "path: unsupported file extension '.xyz' in 'a.xyz'. Use one of .svg"),
        (["a.svg", "--heat", "angle"], "`heat` must be None for LlamaForCausalLM, which has no adapters, got 'angle'."),
    ],
)
def test_errors_of_visualize(shelf: Shelf, words: list[str], said: str) -> None:
    assert mistake("visualize", shelf / "my-model", *words).startswith(said)
