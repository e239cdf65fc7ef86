"""A `PeftModel` after `from_peft`: its methods are those of the adapted base model, so nothing is lost."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft_sides import by_peft, opened_by_peft, peft_warnings_ignored, same_line, same_tensors, saved_by_peft
from tiny_models import inputs, tiny
from torch import Tensor

import hra_fx

TWO: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}


def with_two(**fields: Any) -> Any:
    """A `PeftModelForCausalLM` with the adapters "default", which is active, and "other"."""
    model = by_peft(tiny("llama", torch.float32), task_type="CAUSAL_LM", **TWO, **fields)
    with peft_warnings_ignored():
        model.add_adapter("other", peft.HRAConfig(**{**TWO, "r": 2}))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


@pytest.mark.needs("peft>=0.21")
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}], ids=["vectors", "trained modules"])
def test_it_saves_the_same_files_as_before(fields: dict[str, Any], tmp_path: Path) -> None:
    model = with_two(**fields)
    saved_by_peft(model, tmp_path / "before")
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hra_fx.from_peft(model)
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {*map(id, before)} == {*map(id, after)}, "an optimizer keeps working"
    model.save_pretrained(tmp_path / "after")
    # As a Trainer does it in a checkpoint, which it resumes from these files.
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=model.state_dict())
    for folder in (tmp_path / "after", tmp_path / "checkpoint-1"):
        assert {entry.name for entry in folder.iterdir()} == {entry.name for entry in (tmp_path / "before").iterdir()}
        for name in ("", "other"):
            same_tensors(folder / name, tmp_path / "before" / name)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    assert torch.equal(
        logits(opened_by_peft(tiny("llama", torch.float32), tmp_path / "after")),
        logits(opened_by_peft(tiny("llama", torch.float32), tmp_path / "before")),
    )


def test_its_methods_are_those_of_the_base_model(tmp_path: Path) -> None:
    model = with_two()
    kept, plain = copy.deepcopy(model), logits(tiny("llama", torch.float32))
    ours = hra_fx.from_peft(model)
    assert isinstance(model, peft.PeftModel) and model.get_base_model() is ours
    same_line(kept, model)
    prompt = torch.tensor([[3, 4, 5]])
    for name in ("default", "other"):
        for one in (kept, model):
            one.set_adapter(name)
        assert model.active_adapter == model.base_model.active_adapter == name
        assert model.active_adapters == ours.active_adapters == [name]
        assert relative_error(logits(model), logits(kept)) < 1e-5
        assert torch.equal(model.generate(prompt, max_new_tokens=4), kept.generate(prompt, max_new_tokens=4))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
    wanted = logits(model)
    model.load_adapter(tmp_path / "again" / "other", "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), wanted)
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["default", "other", "third"]
    assert [row.path for row in hra_fx.report(model)] == [row.path for row in hra_fx.report(ours)]
    # PEFT's functions only look for PEFT's layers.
    with pytest.raises(AttributeError, match="Call the function of hra_fx with the same name"):
        peft.get_peft_model_state_dict(model)
    assert hra_fx.save_as_lora(model, tmp_path / "lora").rows[0].path == "model.layers.0.self_attn.q_proj"


def test_a_wrapper_that_was_not_given_raises_an_error(tmp_path: Path) -> None:
    model = with_two()
    hra_fx.from_peft(model.get_base_model())
    for use in (lambda: model.save_pretrained(tmp_path), lambda: peft.get_peft_model_state_dict(model)):
        with pytest.raises(AttributeError, match=r"HRAConfig is not a peft\.PeftConfig\. Call the function of hra_fx"):
            use()
    assert not [*tmp_path.rglob("*.safetensors")]
