"""transformers' Trainer, which takes DDP from accelerate, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from integrations.distributed.spawned import Check
from integrations.distributed.trained import CASES, same, trained
from torch import nn
from transformers import TrainingArguments

import hra_fx
from hra_fx.integrations import HRATrainer

BERT = CASES["bert"]


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.labels = BERT.data()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x[index], "labels": self.labels[index]}


def with_the_term(rank: int, folder: Path) -> None:
    """The whole batch is 8: four for each of two processes, against one process with all and a loop by hand."""
    model = BERT.model()
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1},
        **{"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": []},
        # Else transformers doubles the loss of a model that takes **kwargs and averages by itself, as BERT does.
        average_tokens_across_devices=False,
        **{"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False},
    )
    trainer = HRATrainer(model, arguments, train_dataset=Items(), orthogonality_weight=0.1)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    alone: Any = BERT.model()
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    x, labels = BERT.data()
    for _ in range(2):
        loss = alone(input_ids=x, labels=labels).loss + 0.1 * hra_fx.orthogonality_loss(alone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same(trained(alone), trained(model), within=1e-12)


CHECKS: dict[str, Check] = {"HRATrainer": with_the_term}
