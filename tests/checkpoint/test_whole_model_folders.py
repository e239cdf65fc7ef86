"""`save_pretrained` into a folder that holds a whole model: its weights are not touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from model.many import assert_close, bert, config, ids, moved, oracle, run, turn
from safetensors.torch import load_file
from torch import nn

import hra_fx
from hra_fx.errors import HRAWarning


def prepared(folder: Path) -> tuple[nn.Module, nn.Module, dict[str, bytes]]:
    """The base model, an adapted one, and the files of the base model's folder."""
    plain = bert()
    plain.save_pretrained(folder)
    model = hra_fx.transform(bert(), config("query"))
    turn(model)
    return plain, model, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["checkpoint-500", "model"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_whole_model_stays_and_the_adapter_stands_beside_it(name: str, strict: bool, tmp_path: Path) -> None:
    folder = tmp_path / name
    plain, model, files = prepared(folder)
    text = f"^{re.escape(str(folder))}: the adapters were saved next to a full model"
    if strict:  # warnings are errors here
        with pytest.raises(HRAWarning, match=text):
            model.save_pretrained(folder)
    else:
        with pytest.warns(HRAWarning, match=text):
            model.save_pretrained(folder)
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path: now[path] for path in files} == files
    assert sorted(now.keys() - files.keys()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(folder)).double().eval()
    base.load_state_dict(load_file(folder / "model.safetensors"))
    assert torch.equal(run(base, ids()), run(plain, ids()))
    hra_fx.load_adapter(base, folder)
    wanted = oracle(plain, model, ["default"], ids())
    assert_close(run(base, ids()), wanted, 1e-10)
    assert moved(wanted, run(plain, ids()))


def test_a_save_that_fails_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-500"
    _, model, files = prepared(folder)
    with pytest.raises(hra_fx.AdapterError, match="adapter 'none': the model has no such adapter"):
        model.save_pretrained(folder, selected_adapters=["default", "none"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
