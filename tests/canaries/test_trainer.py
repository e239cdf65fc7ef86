"""What hra_fx reads of transformers' Trainer, and what the Trainer reads of a model."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from canaries.canary import canary
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hra_fx
from hra_fx.integrations import HRATrainer, RotationCallback

of_the_trainer = functools.partial(canary, "transformers")
WEIGHT, RATE = 0.5, 0.1


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> dict[str, Tensor]:
        errors = (self.layer(x) - labels).square()
        return {"loss": errors.mean() if num_items_in_batch is None else errors.sum() / num_items_in_batch}


def regression() -> Any:
    torch.manual_seed(0)
    config = hra_fx.HRAConfig(r=4, init_weights=False, target_modules=["layer"])
    return hra_fx.transform(Regression(), config)


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=8))
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["query"]))


def trainer(model: nn.Module, folder: Path, kind: Any = Trainer, callbacks: Any = None, **arguments: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 1, "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd"}
    settings |= {"learning_rate": RATE, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": []}
    settings |= {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1}
    data = [{"x": torch.randn(3), "labels": torch.randn(2)} for _ in range(4)]
    chosen = TrainingArguments(output_dir=str(folder), **(settings | arguments))  # type: ignore[arg-type]
    return kind(model=model, args=chosen, train_dataset=data, callbacks=callbacks)  # type: ignore[no-any-return]


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
    trainer(regression(), tmp_path, callbacks=[reporter, RotationCallback()]).train()
    assert "angle_mean_degrees" in reporter.logs[0]


@of_the_trainer(
    "how a step divides the loss of accumulated batches (`num_items_in_batch`, `model_accepts_loss_kwargs`, "
    "`compute_loss_func`, `current_gradient_accumulation_steps`)",
    reader="hra_fx/integrations/trainer.py",
    breaks="HRATrainer: its regularizer would not count once per step",
)
@pytest.mark.parametrize("accepts", [False, True])
def test_the_loss_of_accumulated_batches(accepts: bool, tmp_path: Path) -> None:
    steps = []
    for weight in (0.0, WEIGHT):
        model = regression()
        model.accepts_loss_kwargs = accepts
        made = trainer(
            model,
            tmp_path,
            functools.partial(HRATrainer, orthogonality_weight=weight, pair_difference=None),
            gradient_accumulation_steps=4,
            seed=1,
        )
        torch.manual_seed(2)
        made.train()
        steps.append(model.layer.hra_u.default.detach())
    start = regression()
    hra_fx.orthogonality_loss(start).backward()
    expected = -RATE * WEIGHT * start.layer.hra_u.default.grad
    assert torch.allclose(steps[1] - steps[0], expected, rtol=1e-3, atol=1e-6)


@of_the_trainer(
    "`_hf_peft_config_loaded`, by which it takes a quantized model for one with adapters",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the Trainer on quantized models: it would refuse them",
)
def test_quantized_models(tmp_path: Path) -> None:
    model = bert()
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    trainer(model, tmp_path)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(hra_fx.fold(model), tmp_path)


@of_the_trainer(
    "`_keys_to_ignore_on_save`, the keys that a checkpoint may lack",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the Trainer when it resumes: it would warn of missing keys, and not tie the weights",
)
def test_keys_that_a_checkpoint_may_lack(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    made: Any = trainer(model, tmp_path)
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
    vectors = []
    for resumes in (False, True):
        model = bert(seed=int(resumes))
        made = trainer(model, tmp_path, save_strategy="steps", save_steps=1)
        made.train_dataset = [{"input_ids": torch.arange(4), "labels": torch.tensor(1)}]
        made.train(resume_from_checkpoint=resumes)
        vectors.append(model.bert.encoder.layer[0].attention.self.query.hra_u.default)
    assert torch.equal(*vectors), "the second run starts at its end with the vectors of the first one"


@of_the_trainer(
    "`create_or_update_model_card`, which it calls after it has written a model card of its own",
    reader="hra_fx/integrations/pretrained.py",
    breaks="the model cards of adapters that the Trainer writes",
)
def test_model_cards(tmp_path: Path) -> None:
    made = trainer(bert(), tmp_path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    made.create_model_card()
    assert "hra_fx" in (tmp_path / "README.md").read_text()
