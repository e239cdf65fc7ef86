"""`HRATrainer` against `Trainer`: what the regularizer changes, and `train_pairs` against a loop by hand.

`train_pairs` also with accelerate.
"""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from adapting import vectors_of
from oracles import relative_error
from tiny_models import BASES, SHAPES, adapted, batch, config_for, samples, trainer_of
from torch import Tensor, nn
from transformers import Trainer

import hra_fx
from hra_fx.integrations import HRATrainer, PairCallback

WEIGHT = 0.5
LR = 0.1
#: SGD of a constant rate and without clipping: a step is the gradient.
ONE_STEP = {
    **{"per_device_train_batch_size": 2, "max_steps": 1, "max_grad_norm": 0.0},
    **{"optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "logging_strategy": "no"},
}
Weighted = partial(HRATrainer, orthogonality_weight=WEIGHT, pair_difference=None)


def without_dropout(kind: str) -> Any:
    """A model in float64, without dropout; the Trainer divides the loss of one with "a mean loss" itself."""
    name = kind.partition(",")[0]
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    base = BASES[name](**still).double()
    if kind.endswith("a mean loss"):
        base.accepts_loss_kwargs = False
    torch.manual_seed(1)
    return SHAPES["transform"](base, config_for(name, r=4, init_weights=False))


def trainer(maker: Any, kind: str, model: nn.Module, folder: Path, count: int = 4, **arguments: Any) -> Any:
    made = trainer_of(maker, kind.partition(",")[0], model, folder, **(ONE_STEP | arguments))
    made.train_dataset = samples(kind.partition(",")[0], count)
    return made


def penalty(model: nn.Module) -> Tensor:
    """The term in float64, from its formula."""
    total = torch.zeros((), dtype=torch.float64)
    for vectors in vectors_of(model).values():
        columns = vectors.double() / vectors.double().square().sum(dim=0).sqrt()
        total = total + (columns.mT @ columns - torch.eye(columns.shape[1])).square().sum().sqrt()
    return total


@pytest.mark.parametrize(
    ("kind", "steps", "batches"), [("llama", 4, 2), ("bert, a mean loss", 1, 1), ("bert, a mean loss", 4, 2)]
)
def test_the_term_counts_once_per_step_however_many_batches_are_accumulated(
    kind: str, steps: int, batches: int, tmp_path: Path
) -> None:
    """One step from the same start with and without the term: what differs is the term's own step."""
    model = without_dropout(kind)
    models = stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    for maker, each in zip((Trainer, Weighted), models, strict=True):
        made = trainer(maker, kind, each, tmp_path, 2 * batches, gradient_accumulation_steps=steps)
        made.train()
        assert made.state.global_step == 1
    start = vectors_of(model)
    gradients = torch.autograd.grad(penalty(model), list(start.values()))
    for (name, before), gradient in zip(start.items(), gradients, strict=True):
        without, having = vectors_of(stock)[name], vectors_of(ours)[name]
        assert float((without - before).detach().norm()) > 1e-8, "the task has a step too"
        assert relative_error(having - without, -LR * WEIGHT * gradient) < 1e-12


def test_the_training_logs_have_the_mean_of_the_term_and_evaluations_do_not(tmp_path: Path) -> None:
    model, seen = without_dropout("bert"), []

    class Watched(HRATrainer):
        """Keeps the term as it is before each step."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(float(penalty(self.model).detach()))
            return super().training_step(*args, **kwargs)

    logging = {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 2}
    maker = partial(Watched, orthogonality_weight=WEIGHT)
    made = trainer(maker, "bert", model, tmp_path, 8, eval_strategy="steps", eval_steps=1, **logging)
    made.train()
    logged = [entry["orthogonality"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(seen[:2]) / 2, sum(seen[2:]) / 2], rel=1e-13)
    assert [key for entry in made.state.log_history if "loss" not in entry for key in entry if "orthog" in key] == []
    wanted = trainer(Trainer, "bert", model, tmp_path).evaluate()["eval_loss"]
    assert [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry][-1] == wanted
    assert made.evaluate()["eval_loss"] == wanted


@pytest.mark.parametrize("weight", [-1e-6, float("nan"), True, "1e-6"])
def test_an_invalid_weight_or_difference_is_refused(weight: Any) -> None:
    with pytest.raises(hra_fx.ConfigError) as caught:
        HRATrainer(orthogonality_weight=weight)
    assert str(caught.value) == (
        f"`orthogonality_weight` must be a finite number >= 0, got {weight!r}. Use 0.0 to disable the term, or a small "
        "value such as 1e-6."
    )
    for difference in (0.0, weight):
        with pytest.raises(hra_fx.ConfigError, match="`pair_difference` must be a finite number > 0"):
            HRATrainer(pair_difference=difference)
        with pytest.raises(hra_fx.ConfigError, match="`difference` must be a finite number > 0"):
            PairCallback(difference)


def test_a_model_without_reflections_is_refused_with_a_weight_and_trained_without(tmp_path: Path) -> None:
    model = hra_fx.fold(without_dropout("bert"))
    model.classifier.requires_grad_(True)
    trainer(HRATrainer, "bert", model, tmp_path).train()
    message = "BertForSequenceClassification has no adapters. Call hra_fx.transform(model, config) first."
    with pytest.raises(hra_fx.AdapterError, match=re.escape(message)):
        trainer(Weighted, "bert", model, tmp_path).train()


AdamW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
# The default of transformers, the fused AdamW, rounds otherwise than `AdamW` on some CPUs.
RUN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3, "seed": 3, "optim": "adamw_torch"}


def optimizer_for(model: nn.Module, *, pairs: bool = True) -> Any:
    optimizer = AdamW([one for one in model.parameters() if one.requires_grad])
    if pairs:
        hra_fx.train_pairs(optimizer, model)
    return optimizer


def trained(maker: Any, model: nn.Module, folder: Path, *, line: bool = False, **arguments: Any) -> Any:
    trainer = trainer_of(maker, "llama", model, folder, **(RUN | arguments))
    if line:
        hra_fx.train_pairs(trainer.create_optimizer(), trainer.model)
    trainer.train()
    return [vectors.detach().clone() for vectors in vectors_of(model).values()]


def equal(one: Any, other: Any) -> bool:
    """Whether vectors are equal but for rounding."""
    return all(torch.allclose(*both, rtol=1e-5, atol=1e-6) for both in zip(one, other, strict=True))


def test_the_trainers_of_transformers_train_pairs_and_quiet_pairs(tmp_path: Path) -> None:
    start = adapted("llama", "transform")
    model = copy.deepcopy(start)
    wanted = trained(partial(Trainer, optimizers=(optimizer_for(model), None)), model, tmp_path)  # type: ignore[arg-type]
    assert not equal(wanted, trained(Trainer, copy.deepcopy(start), tmp_path)), "they differ from steps of vectors"
    assert equal(wanted, trained(HRATrainer, copy.deepcopy(start), tmp_path))
    assert equal(wanted, trained(Trainer, copy.deepcopy(start), tmp_path, line=True))
    assert equal(wanted, trained(partial(Trainer, callbacks=[PairCallback()]), copy.deepcopy(start), tmp_path))
    for pairs in (False, True):  # its own optimizer: not twice
        model = copy.deepcopy(start)
        maker = partial(HRATrainer, optimizers=(optimizer_for(model, pairs=pairs), None))  # type: ignore[arg-type]
        assert equal(wanted, trained(maker, model, tmp_path))
    # Quiet pairs, for the first examples.
    model = copy.deepcopy(start)
    loader = trainer_of(Trainer, "llama", model, tmp_path).get_train_dataloader()
    rows = [loader.dataset[index] for index in range(min(16, len(loader.dataset)))]  # type: ignore[arg-type]
    optimizer = optimizer_for(model, pairs=False)
    batches = [loader.collate_fn(rows[first : first + 4]) for first in range(0, len(rows), 4)]
    hra_fx.train_pairs(optimizer, model, batches=batches, directions=2)
    wanted = trained(partial(Trainer, optimizers=(optimizer, None)), model, tmp_path)
    assert not equal(wanted, trained(HRATrainer, copy.deepcopy(start), tmp_path))
    callback = partial(Trainer, callbacks=[PairCallback(quiet_directions=2)])
    for maker in (partial(HRATrainer, quiet_directions=2), callback):
        assert equal(wanted, trained(maker, copy.deepcopy(start), tmp_path))


def test_a_training_continues_in_pairs_of_the_same_difference(tmp_path: Path) -> None:
    start, maker = adapted("llama", "transform"), partial(Trainer, callbacks=[PairCallback()])
    wanted = trained(maker, copy.deepcopy(start), tmp_path / "whole", max_steps=4)
    folder, saving = tmp_path / "run", {"save_strategy": "steps", "save_steps": 2}
    trained(maker, copy.deepcopy(start), folder, max_steps=2, **saving)

    def again(maker: Any) -> Any:
        trainer = trainer_of(maker, "llama", copy.deepcopy(start), folder, **(RUN | {"max_steps": 4} | saving))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        return vectors_of(trainer.model).values()  # type: ignore[arg-type]

    assert equal(wanted, again(maker))
    for difference, message in {
        0.2: r"saved with difference=0.1.*HRATrainer: pair_difference=0.1",
        None: r"saved with pairs, difference=0.1.* Pass pair_difference=0.1",
    }.items():
        with pytest.raises(hra_fx.AdapterError, match=message):
            again(partial(HRATrainer, pair_difference=difference))


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate(when: str) -> None:
    """It replaces `step` while a scaler calls it, by one that it took before."""
    model = adapted("llama", "transform")
    plain = copy.deepcopy(model)
    optimizer = optimizer_for(model, pairs=when == "before")
    model, _ = Accelerator(cpu=True).prepare(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    if when == "after":
        hra_fx.train_pairs(wrapped, model)
    data = batch("llama", 2)
    for each, one in ((model, wrapped), (plain, optimizer_for(plain))):
        for _ in range(2):
            one.zero_grad()
            loss = each(**data).loss
            (scaler.scale(loss) if each is model else loss).backward()
            one.step()
    assert equal(*(vectors_of(each).values() for each in (model, plain)))
