"""`inspect`: values match `hra_fx.report` and the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake
from moe_models import TARGETS, built
from safetensors.torch import save_file

import hra_fx


def inspected(*words: object) -> Any:
    return Answer("inspect", *words, "--json").json


@pytest.mark.parametrize("name", ["my-adapter", "orthonormal", "experts"])
def test_they_are_those_of_the_report_of_the_model(shelf: Shelf, name: str, tmp_path: Path) -> None:
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


def test_what_an_adapter_is(shelf: Shelf) -> None:
    look = inspected(shelf / "orthonormal")
    assert (look["kind"], look["r"], look["gram_schmidt"], look["anchor"]) == ("adapter", 2, True, 2)
    assert (look["written_by"], look["base_model"], look["dtype"]) == ("hra_fx", None, "float32")
    assert look["target_modules"] == ["o_proj", "q_proj"]
    assert look["parameters"] == 4 * 2 * 16
    text = answer("inspect", shelf / "orthonormal")
    assert "r = 2, orthonormalized by Gram-Schmidt, and 2 frozen anchor vectors" in text


def test_an_adapter_of_peft(shelf: Shelf, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.HRAConfig(r=4, target_modules=["q_proj"], init_weights=False, modules_to_save=["lm_head"])
    model = copy.deepcopy(shelf.model)
    model.name_or_path = str(shelf / "my-model")
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    look = inspected(tmp_path)
    assert look["written_by"] == f"PEFT {peft.__version__}"
    assert look["base_model"] == str(shelf / "my-model")
    assert (look["r"], look["anchor"], look["saved"]) == (4, 0, ["lm_head.weight"])
    assert "also trained  lm_head.weight" in answer("inspect", tmp_path)


def test_layers_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = made.stack_adapter(tmp_path / "stack", layers=12)
    assert [layer["path"] for layer in inspected(folder)["layers"]] == [str(i) for i in range(12)]


def test_a_layer_that_nothing_turns(tmp_path: Path) -> None:
    folder = made.stack_adapter(tmp_path / "stack", layers=1)
    column = torch.ones(6, 1)
    file = folder / "adapter_model.safetensors"
    save_file({"base_model.model.0.hra_u": torch.cat([column, column], dim=1)}, file, {"format": "pt"})
    layer = inspected(folder)["layers"][0]
    assert (layer["angles"], layer["angle"], layer["mean_angle"]) == ([], 0.0, 0.0)
    assert layer["rotation"] == pytest.approx(0, abs=1e-6)
    assert " 0°" in answer("inspect", folder)


def test_a_model(shelf: Shelf) -> None:
    look = inspected(shelf / "my-model")
    linear = {path: m for path, m in shelf.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert [(layer["path"], layer["d"], layer["parameters"]) for layer in look["layers"]] == [
        (path, module.in_features, module.weight.numel()) for path, module in linear.items()
    ]
    assert (look["kind"], look["model"], look["library"]) == ("model", "LlamaForCausalLM", "transformers")
    assert look["parameters"] == sum(p.numel() for p in shelf.model.parameters())
    assert look["default_targets"] == ["q_proj", "v_proj"]
    (file,) = look["files"]
    assert file["dtypes"] == ["BF16"] and file["bytes"] == (shelf / "my-model" / "model.safetensors").stat().st_size
    text = answer("inspect", shelf / "my-model")
    assert "model.layers.*.self_attn.q_proj       2   Linear 16->16" in text


def test_mistakes(shelf: Shelf, tmp_path: Path) -> None:
    assert mistake("inspect", tmp_path) == (
        f"{tmp_path}: does not contain adapter_config.json or config.json. Pass the folder of an adapter or a model."
    )
    assert "no/such/folder: no such folder, and not a valid Hub" in mistake("inspect", "no/such/folder")
    said = mistake("inspect", shelf.folder)
    assert "There are adapters in the subfolders 'my-adapter', 'orthonormal', 'second': pass the path of" in said
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a diffusers pipeline. Pass one of its parts: unet, vae." in mistake("inspect", tmp_path)
