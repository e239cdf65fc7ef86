"""`visualize` draws what `hra_fx.visualize` draws of the model in memory."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake

import hra_fx
from hra_fx.cli.building import build


@pytest.mark.parametrize("ending", ["svg", "html", "mmd", "dot", "graphml"])
def test_an_adapter_without_weights_is_drawn_as_with_them(shelf: Shelf, tmp_path: Path, ending: str) -> None:
    words = ["--adapter", shelf / "my-adapter", "--heat", "mean_angle"]
    out = tmp_path / f"picture.{ending}"
    assert answer("visualize", shelf / "my-model", out, *words) == f"{out}\n"
    model = hra_fx.load_adapter(copy.deepcopy(shelf.model), shelf / "my-adapter")
    wanted = hra_fx.visualize(model, tmp_path / f"wanted.{ending}", heat="mean_angle")
    # How much of a weight is rotated, and how much it changes, is known with the weight only.
    drawn, due = (
        re.sub(r'"(?:share|weight_change)":(\{[^{}]*\}|\[[^\]]*\]|[^,}\]]*)', "", file.read_text())
        for file in (out, wanted)
    )
    assert drawn == due


@pytest.mark.parametrize(
    ("ending", "options"),
    [("svg", {"focus": "model.layers.0", "depth": 1, "heat": "mean_angle"}), ("html", {"heat": "share"})],
)
def test_options_are_those_of_the_function(shelf: Shelf, tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    """`--heat share` reads the weights on disk."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    out = tmp_path / f"a.{ending}"
    done = Answer("visualize", shelf / "my-model", out, "--adapter", shelf / "my-adapter", *words, "--json")
    assert done.json == {"file": str(out)}
    model = hra_fx.load_adapter(copy.deepcopy(shelf.model), shelf / "my-adapter")
    assert out.read_text() == hra_fx.visualize(model, tmp_path / f"b.{ending}", **options).read_text()


def test_weights_of_timm_and_transformers_are_loaded(shelf: Shelf, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    for folder, whole in ((tmp_path, model), (shelf / "my-model", shelf.model)):
        loaded = build(folder, weights=True)[0].state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in whole.state_dict().items())


def test_a_model_that_is_built_takes_no_memory(shelf: Shelf) -> None:
    model = build(shelf / "my-model")[0]
    assert model.state_dict().keys() == shelf.model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert tensor.shape == shelf.model.state_dict()[key].shape and tensor.is_meta


def test_tied_tensors_are_one(shelf: Shelf, tmp_path: Path) -> None:
    entries = json.loads((shelf / "my-model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries | {"tie_word_embeddings": True}))
    built = build(tmp_path)[0]
    assert built.lm_head.weight is built.model.embed_tokens.weight


def test_a_folder_that_is_not_there_is_named_before_the_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    said = mistake("visualize", tmp_path, tmp_path / "absent" / "a.svg")
    assert re.match(r"path: the folder '.*absent' does not exist\. Create it", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.xyz"], "path: unsupported file extension '.xyz' in 'a.xyz'. Use one of .svg"),
        (["a.svg", "--heat", "hot"], "`heat` must be one of 'weight_change'"),
        (["a.svg", "--depth", "-1"], "`depth` must be a non-negative int or None, got -1."),
        (["a.svg", "--heat", "angle"], "`heat` must be None for LlamaForCausalLM, which has no adapters, got 'angle'."),
    ],
)
def test_mistakes(shelf: Shelf, words: list[str], said: str) -> None:
    assert mistake("visualize", shelf / "my-model", *words).startswith(said)


def test_an_adapter_of_another_model(shelf: Shelf, tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
    said = mistake("visualize", tmp_path, tmp_path / "a.svg", "--adapter", shelf / "my-adapter")
    assert "the configuration does not fit VisionTransformer" in said


def test_weights_that_are_not_there(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((shelf / "my-model" / "config.json").read_bytes())
    said = mistake("visualize", tmp_path, tmp_path / "a.svg", "--weights")
    assert "transformers cannot load the model (OSError:" in said
