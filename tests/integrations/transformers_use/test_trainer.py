"""transformers' Trainer: a run that was stopped goes on as if it never had; also after `from_peft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.trl_use.runs import logs
from peft_sides import by_peft
from safetensors.torch import load_file
from tiny_models import BASES, FIELDS, SHAPES, adapted, batch, trained_in, trainer_of
from torch import nn
from transformers import Trainer, TrainerCallback

import hra_fx

pytestmark = pytest.mark.usefixtures("nothing_is_logged")

EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}


class StopAt(TrainerCallback):
    """Ends a run, as a job does that runs out of its time."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def assert_same_training(model: nn.Module, other: nn.Module) -> None:
    wanted, found = model.state_dict(), other.state_dict()
    assert wanted.keys() == found.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], found[key])] == []


@pytest.mark.parametrize(
    ("latest", "kind", "shape", "fields", "protected"),
    [
        (True, "bert", "transform", {}, False),
        (True, "bert", "HRAModel", {"apply_GS": True}, False),
        (False, "bert", "transform", {"bias": "all", "r": 4}, True),
        (True, "llama", "HRAModel", {}, True),
    ],
)
def test_a_run_that_was_stopped_goes_on_bitwise(
    latest: bool, kind: str, shape: str, fields: dict[str, Any], protected: bool, tmp_path: Path
) -> None:
    """Six steps at once against three, and three more with new objects in the other shape, from other vectors.

    The new model protects nothing before it is loaded.
    """
    model, first = (adapted(kind, shape, **fields) for _ in range(2))
    for each in (model, first) if protected else ():
        hra_fx.protect(each, [batch(kind)], 4)
    whole = trainer_of(Trainer, kind, model, tmp_path / "whole")
    whole.train()

    folder = tmp_path / "parts"
    stopped = trainer_of(Trainer, kind, first, folder, **EVERY_THIRD)
    stopped.add_callback(StopAt(3))
    stopped.train()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3"]

    resumed = adapted(kind, next(other for other in SHAPES if other != shape), seed=77, **fields)
    again = trainer_of(Trainer, kind, resumed, folder, **EVERY_THIRD)
    again.train(resume_from_checkpoint=True if latest else str(folder / "checkpoint-3"))
    assert again.state.global_step == 6
    assert logs(again, "loss") == logs(whole, "loss")
    assert_same_training(model, resumed)
    assert again.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted("llama", "transform")
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(Trainer, "llama", model, tmp_path, **every, **best)  # the first one, of the largest loss
    trainer.train()
    first, *others = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(others) == 2 and first > max(others) + 1e-3
    assert trainer.evaluate()["eval_loss"] == first
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in trained_in(model).items())


def test_a_checkpoint_has_the_files_of_pefts_and_one_more(tmp_path: Path) -> None:
    """The Trainer reads the adapter's own file for a `PeftModel` only, and model.safetensors for every other model."""
    models = {"ours": adapted("llama", "HRAModel"), "theirs": by_peft(BASES["llama"](), **FIELDS["llama"])}
    names = {}
    for side, model in models.items():
        trainer_of(Trainer, "llama", model, tmp_path / side, **EVERY_THIRD, max_steps=3).train()
        names[side] = {path.name for path in (tmp_path / side / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} < names["theirs"]
    assert names["ours"] == names["theirs"] | {"model.safetensors"}
    tensors = load_file(tmp_path / "ours" / "checkpoint-3" / "model.safetensors")
    full = {key for key, tensor in tensors.items() if tensor.numel()}
    assert full == trained_in(models["ours"]).keys(), "no base weights"
    # PEFT would match none of these names, and go on from its initial vectors.
    again = trainer_of(Trainer, "llama", by_peft(BASES["llama"](), **FIELDS["llama"]), tmp_path / "again")
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\..*\.hra_u\.default"):
        again.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
