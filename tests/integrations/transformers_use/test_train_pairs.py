"""`train_pairs` with the Trainers of transformers and TRL, and with accelerate; compared with a loop by hand."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from integrations.trl_use import runs
from oracles import relative_error
from tiny_models import adapted, samples, trainer_of, vectors_of
from torch import nn
from transformers import Trainer

import hra_fx
from hra_fx.integrations import HRATrainer, PairCallback

AdamW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
RUN = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3, "seed": 3}


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
    """Whether vectors are equal but for rounding: the implementations of AdamW differ in it on some CPUs."""
    return all(torch.allclose(*both, rtol=1e-5, atol=1e-6) for both in zip(one, other, strict=True))


def test_the_trainers_of_transformers_train_pairs(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("maker", [HRATrainer, partial(Trainer, callbacks=[PairCallback()])])
def test_a_training_continues_in_pairs(maker: Any, tmp_path: Path) -> None:
    start = adapted("llama", "transform")
    wanted = trained(maker, copy.deepcopy(start), tmp_path / "whole", max_steps=4)
    folder, saving = tmp_path / "run", {"save_strategy": "steps", "save_steps": 2}
    trained(maker, copy.deepcopy(start), folder, max_steps=2, **saving)
    trainer = trainer_of(maker, "llama", copy.deepcopy(start), folder, **(RUN | {"max_steps": 4} | saving))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert equal(wanted, vectors_of(trainer.model).values())  # type: ignore[arg-type]
    if maker is HRATrainer:
        other = partial(HRATrainer, pair_difference=0.2)
        again = trainer_of(other, "llama", copy.deepcopy(start), folder, **(RUN | {"max_steps": 4} | saving))  # type: ignore[arg-type]
        with pytest.raises(hra_fx.AdapterError, match=r"saved with difference=0.1.*HRATrainer: pair_difference=0.1"):
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        vectors = partial(HRATrainer, pair_difference=None)
        again = trainer_of(vectors, "llama", copy.deepcopy(start), folder, **(RUN | {"max_steps": 4} | saving))  # type: ignore[arg-type]
        with pytest.raises(hra_fx.AdapterError, match=r"saved with pairs, difference=0.1.* Pass pair_difference=0.1"):
            again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("scaled", [False, True])
def test_accelerate(when: str, scaled: bool) -> None:
    """It replaces `step` while a scaler calls it, by one that it took before."""
    model = adapted("llama", "transform")
    plain = copy.deepcopy(model)
    optimizer = optimizer_for(model, pairs=when == "before")
    accelerator = Accelerator(cpu=True)
    wrapped: Any
    model, wrapped = accelerator.prepare(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    if scaled:
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    if when == "after":
        hra_fx.train_pairs(wrapped, model)
    other = optimizer_for(plain)
    data = {key: torch.stack([one[key] for one in samples("llama", 2)]) for key in ("input_ids", "labels")}
    for each, one in ((model, wrapped), (plain, other)):
        for _ in range(2):
            one.zero_grad()
            loss = each(**data).loss
            (scaler.scale(loss) if scaled and each is model else loss).backward()
            one.step()
    assert equal(*(vectors_of(each).values() for each in (model, plain)))


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
def test_trl(tmp_path: Path) -> None:
    """A transformed model, and PEFT's HRA, which the Trainer makes from a configuration."""
    found = []
    for kind, by in ((runs.OURS, None), (runs.OURS, "a line"), (runs.FAST, "a callback")):
        trainer = runs.trainer(kind, "SFT", tmp_path)
        if by == "a line":
            hra_fx.train_pairs(trainer.create_optimizer(), trainer.model)
        elif by:
            trainer.add_callback(PairCallback())
        trainer.train()
        found.append(torch.cat([one.detach().flatten() for one in runs.vectors_of(trainer.model).values()]))
    assert relative_error(found[2], found[1]) < 1e-4
    assert relative_error(found[0], found[1]) > 1e-3


@pytest.mark.parametrize("difference", [0.0, float("nan"), True, "0.1"])
def test_an_invalid_difference_is_refused(difference: Any) -> None:
    with pytest.raises(hra_fx.ConfigError, match="`pair_difference` must be a finite number > 0"):
        HRATrainer(pair_difference=difference)
    with pytest.raises(hra_fx.ConfigError, match="`difference` must be a finite number > 0"):
        PairCallback(difference)
