"""transformers' Trainer: checkpoints contain the adapter, a run is resumed, and the paper's regularizer is added."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import hra_fx


class Majority(Dataset):
    """Sequences of 0 and 1; the label is the more frequent one."""

    def __init__(self, size: int, seed: int) -> None:
        self.tokens = torch.randint(0, 2, (size, 9), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": (tokens.sum() > 4).long()}


class Angles(TrainerCallback):
    """Logs the mean rotation angle of the adapted layers with each loss."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs and state.is_world_process_zero:
            angles = [row.mean_angle for row in hra_fx.report(kwargs["model"])]
            logs["angle_degrees"] = math.degrees(sum(angles) / len(angles))
            state.log_history[-1].update(logs)  # it was copied before this call


class Regularized(Trainer):
    """The Trainer with the paper's regularizer, which most trainings do not need."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        if model.training:
            loss = loss + 1e-4 * hra_fx.orthogonality_loss(model)
        return (loss, outputs) if return_outputs else loss


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=4, **sizes))
    config = hra_fx.HRAConfig(r=4, target_modules=["query", "key", "value"], task_type="SEQ_CLS")  # trains the head too
    return hra_fx.transform(base, config)


def trainer(folder: str, steps: int) -> Trainer:
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=20, learning_rate=1e-2, per_device_train_batch_size=32, seed=0,
        logging_steps=40, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    made = Regularized(model(), arguments, train_dataset=Majority(640, 1), eval_dataset=Majority(256, 2))
    made.callback_handler.callbacks.insert(0, Angles())  # before reporters such as TensorBoard
    return made


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(folder, 40)
        start = run.evaluate()["eval_loss"]
        run.train()
        angle = max(logs.get("angle_degrees", 0.0) for logs in run.state.log_history)
        whole = run.evaluate()["eval_loss"]
        for file in sorted(Path(folder, "checkpoint-20").glob("*adapter*")):
            print(f"checkpoint-20/{file.name}: {file.stat().st_size / 1e3:.0f} kB")

        again = trainer(folder, 40)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-20")
        resumed = again.evaluate()["eval_loss"]
        print(f"mean angle of a layer: {angle:.1f} degrees")
        print(f"eval_loss at the start {start:.6f}, after the whole run {whole:.6f}, after a resumed run {resumed:.6f}")


if __name__ == "__main__":
    main()
