"""The callback in real runs of the Trainer: what reporters and logs get."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

import hra_fx
from hra_fx.integrations import RotationCallback

KEYS = {"angle_mean_degrees", "angle_largest_degrees", "orthogonality_error"}


class Recorder(TrainerCallback):
    """Keeps what a reporter gets. Like a reporter, it is called before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seen.append({**logs, "step": state.global_step})


def llama(*adapters: str, **fields: Any) -> Any:
    model = tiny_models.llama()
    hra = hra_fx.HRAConfig(r=4, target_modules=["q_proj", "v_proj"], **fields)
    first, *others = adapters or ("default",)
    model = hra_fx.transform(model, hra, first)
    for name in others:
        hra_fx.add_adapter(model, name, hra)
    return model


def trainer_of(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **arguments: Any) -> Trainer:
    settings = {"max_steps": 5, "learning_rate": 0.05, "logging_steps": 2} | arguments
    trainer = tiny_models.trainer_of(Trainer, "llama", model, folder, **settings)
    for callback in callbacks:
        callback.add_to(trainer) if isinstance(callback, RotationCallback) else trainer.add_callback(callback)
    return trainer


def wanted(model: nn.Module, adapter: str = "default") -> dict[str, float]:
    """The values from the report, which other tests compare with an oracle."""
    rows = [row for row in hra_fx.report(model) if row.adapter == adapter]
    return {
        "angle_mean_degrees": math.degrees(sum(row.mean_angle for row in rows) / len(rows)),
        "angle_largest_degrees": math.degrees(max(row.angle for row in rows)),
        "orthogonality_error": max(row.orthogonality for row in rows),
    }


def test_logs_and_reporters_get_the_values_of_the_report_with_each_loss(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.append(wanted(model))

    recorder, callback, model = Recorder(), RotationCallback(), llama()
    trainer = trainer_of(model, tmp_path, [recorder, Watch()], eval_strategy="steps", eval_steps=1)
    assert callback.add_to(trainer) is callback
    trainer.train()
    training = [entry for entry in recorder.seen if "loss" in entry]
    assert [entry["step"] for entry in training] == [2, 4]
    assert [{key: entry[key] for key in KEYS} for entry in training] == [pytest.approx(seen[i]) for i in (1, 3)]
    assert training[0]["angle_mean_degrees"] > 0
    assert training[0]["orthogonality_error"] < 1e-5
    others = [entry for entry in recorder.seen if "loss" not in entry]
    assert len(others) >= 5, "evaluations, and the summary of the run"
    assert not any(KEYS & entry.keys() for entry in others)
    # A callback of transformers removes the number of operations before a later one sees it.
    history = [
        {key: value for key, value in entry.items() if key != "total_flos"} for entry in trainer.state.log_history
    ]
    assert history == recorder.seen


def test_several_active_adapters_are_logged_by_name(tmp_path: Path) -> None:
    model = llama("first", "second", "third")
    hra_fx.set_adapter(model, ["first", "second"])
    recorder = Recorder()
    trainer_of(model, tmp_path, [recorder, RotationCallback()], max_steps=4).train()
    keys = {key for entry in recorder.seen for key in entry if key.split("/")[0] in KEYS}
    assert keys == {f"{key}/{name}" for key in KEYS for name in ("first", "second")}
    last = [entry for entry in recorder.seen if "loss" in entry][-1]
    for name in ("first", "second"):
        assert {key: last[f"{key}/{name}"] for key in KEYS} == pytest.approx(wanted(model, name))


def called_alone(callback: RotationCallback, model: nn.Module, *, first_process: bool = True) -> dict[str, float]:
    """One log by the Trainer's own callback handler."""
    arguments = TrainingArguments(output_dir="unused", report_to=[], use_cpu=True)
    state = TrainerState(is_world_process_zero=first_process, global_step=0)
    handler = CallbackHandler([callback], model, None, None, None)  # type: ignore[no-untyped-call]
    handler.callbacks.append(TrainerCallback())
    logs = {"loss": 1.0}
    control = handler.on_train_begin(arguments, state, TrainerControl())
    state.global_step = 1
    handler.on_log(arguments, state, control, logs)
    return logs


def test_other_processes_and_sharded_vectors_log_nothing() -> None:
    callback, model = RotationCallback(), llama()
    assert called_alone(callback, model, first_process=False) == {"loss": 1.0}
    for name, parameter in model.named_parameters():
        if ".hra_u." in name:  # as DeepSpeed ZeRO-3 leaves them outside of the forward
            parameter.data = torch.empty(0)
    with pytest.warns(hra_fx.HRAWarning, match=r"^RotationCallback: the vectors are sharded"):
        assert called_alone(callback, model) == {"loss": 1.0}


def test_a_model_without_adapters_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(hra_fx.AdapterError, match=r"^LlamaForCausalLM has no adapters\."):
        trainer_of(hra_fx.fold(llama()), tmp_path, [RotationCallback()]).train()
