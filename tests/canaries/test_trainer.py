"""What hra_fx reads of transformers' Trainer, and what the Trainer reads of a model."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from canaries.canary import canary
from integrations.transformers_use import test_hra_trainer, test_saving_models, test_trainer as test_resuming
from tiny_models import adapted, trainer_of
from transformers import Trainer, TrainerCallback

import hra_fx
from hra_fx.integrations import RotationCallback

of_the_trainer = functools.partial(canary, "transformers")


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@of_the_trainer(
    "`CallbackHandler.callbacks`, or the order in which it passes one dict of logs to all of them",
    reader="hra_fx/integrations/rotation.py",
    breaks="RotationCallback: reporters such as TensorBoard would get no angles",
)
def test_callbacks(tmp_path: Path) -> None:
    reporter = Reporter()
    maker: Any = functools.partial(Trainer, callbacks=[reporter, RotationCallback()])
    trainer_of(maker, "llama", adapted("llama", "transform"), tmp_path, max_steps=1).train()
    assert "angle_mean_degrees" in reporter.logs[0]


@of_the_trainer(
    "how a step divides the loss of accumulated batches (`num_items_in_batch`, `model_accepts_loss_kwargs`, "
    "`compute_loss_func`, `current_gradient_accumulation_steps`)",
    reader="hra_fx/integrations/trainer.py",
    breaks="HRATrainer: its regularizer would not count once per step",
)
@pytest.mark.parametrize("kind", ["bert", "bert, a mean loss"])
def test_the_loss_of_accumulated_batches(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_hra_trainer.test_the_term_counts_once_per_step_however_many_batches_are_accumulated(
        kind, 4, 4, None, None, tmp_path, monkeypatch
    )


@of_the_trainer(
    "`_hf_peft_config_loaded`, by which it takes a quantized model for one with adapters",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the Trainer on quantized models: it would refuse them",
)
def test_quantized_models(tmp_path: Path) -> None:
    model = adapted("bert", "transform")
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    trainer_of(Trainer, "bert", model, tmp_path)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(Trainer, "bert", hra_fx.fold(model), tmp_path)


@of_the_trainer(
    "`_keys_to_ignore_on_save`, the keys that a checkpoint may lack",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the Trainer when it resumes: it would warn of missing keys, and not tie the weights",
)
def test_keys_that_a_checkpoint_may_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("llama", "transform")
    made: Any = trainer_of(Trainer, "llama", model, tmp_path)
    held = {name: value for name, value in model.state_dict().items() if ".hra_u." in name}
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger.name):
        made._issue_warnings_after_load(model.load_state_dict(held, strict=False))
        assert not caplog.messages
        made._issue_warnings_after_load(model.load_state_dict({}, strict=False))
    logger.removeHandler(caplog.handler)
    assert "missing keys" in caplog.text, "it warns of others"


@of_the_trainer(
    "the names of the folders and files of its checkpoints",
    reader="hra_fx/checkpoint/saving.py",
    breaks="the Trainer when it resumes: it would not find the adapters",
)
def test_checkpoints(tmp_path: Path) -> None:
    test_resuming.test_a_run_that_was_stopped_goes_on_bitwise("stock", True, "bert", "transform", tmp_path)


@of_the_trainer(
    "`create_or_update_model_card`, which it calls after it has written a model card of its own",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the model cards of adapters that the Trainer writes",
)
def test_model_cards(tmp_path: Path) -> None:
    test_saving_models.test_the_trainers_card_gets_the_metadata("transform", tmp_path)
