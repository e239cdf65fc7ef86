"""The folder of a Trainer's checkpoint: adapters and, beside them, the entries that it resumes from, whole or old."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.folders import files_of_at_most, picture
from model.many import bert, config, ids, run, turn
from oracles import relative_error
from safetensors.torch import load_file

import hra_fx

SHAPES = {"transform": hra_fx.transform, "HRAModel": hra_fx.HRAModel}
shapes = pytest.mark.parametrize("shape", SHAPES)
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def model_of(shape: str) -> Any:
    model = SHAPES[shape](bert(), config("query", "value"))
    turn(model)
    return model


@shapes
def test_it_holds_the_adapter_and_what_the_trainer_resumes_from(shape: str, tmp_path: Path) -> None:
    model, name = model_of(shape), "checkpoint-1200"
    model.save_pretrained(tmp_path / name)
    assert sorted(file.name for file in (tmp_path / name).iterdir()) == [*ADAPTER, "model.safetensors"]
    entries = load_file(tmp_path / name / "model.safetensors")
    state = model.state_dict()
    assert entries.keys() == {key for key in state if ".hra_u." in key}
    assert len(entries) == 4
    for key, tensor in entries.items():
        assert torch.equal(tensor, state[key]), key
    fresh = SHAPES[shape](bert(), config("query", "value"))
    assert fresh.load_state_dict(entries, strict=False).unexpected_keys == []
    assert torch.equal(run(fresh, ids()), run(model, ids()))
    opened = hra_fx.load_adapter(bert(), tmp_path / name)
    assert relative_error(run(opened, ids()), run(model, ids())) < 1e-13


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


def test_where_only_the_trainers_file_is_too_large_it_stays_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    # The Trainer's file holds all adapters, the adapter's file only its own.
    model = model_of("transform")
    hra_fx.add_adapter(model, "more", config("query", "value", "dense", r=8, init_weights=False))
    model.save_pretrained(folder, selected_adapters=["default"])
    before = picture(folder)
    small, large = len(before["adapter_model.safetensors"]), len(before["model.safetensors"])
    assert small + 500 < large
    turn(model, seed=7)
    message = (
        rf"^{re.escape(str(folder / 'model.safetensors'))}: cannot write the file \(\[Errno {errno.EFBIG}\].*\)\. "
        r"The old file, if any, is unchanged\.$"
    )
    with files_of_at_most(small + 400), pytest.raises(hra_fx.CheckpointError, match=message):
        model.save_pretrained(folder, selected_adapters=["default"])
    after = picture(folder)
    assert sorted(after) == sorted(before)
    assert after["model.safetensors"] == before["model.safetensors"]
