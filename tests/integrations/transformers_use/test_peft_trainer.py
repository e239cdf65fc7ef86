"""The Trainer of a `PeftModel` after `from_peft`: it saves and resumes the adapters that hra_fx took over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft_sides import by_peft, same_tensors
from tiny_models import FIELDS, llama, trainer_of
from transformers import Trainer

import hra_fx

pytestmark = pytest.mark.usefixtures("nothing_is_logged")


def run(folder: Path, **arguments: Any) -> Trainer:
    """A Trainer of a `PeftModel`."""
    model = by_peft(llama(), **FIELDS["llama"], init_weights=False)
    return trainer_of(Trainer, "llama", model, folder, **arguments)


def test_a_trainer_trains_and_resumes_after_from_peft(tmp_path: Path) -> None:
    """As with PEFT's own layers, in the same order of random numbers."""
    losses = []
    for number in range(3):
        trainer = run(tmp_path / str(max(number, 1)), save_strategy="steps", save_steps=3)
        if number:
            hra_fx.from_peft(trainer.model)
        trainer.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3") if number == 2 else None)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(str(tmp_path / f"end-{number}"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == losses[1]
    same_tensors(tmp_path / "end-1", tmp_path / "end-2")
