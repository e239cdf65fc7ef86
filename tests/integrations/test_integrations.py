"""`HRATrainer` compared with `Trainer`: what the regularizer changes, and what it does not."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import hra_fx
from hra_fx.integrations import HRATrainer
from hra_fx.model.orthogonality import orthogonality_loss

WEIGHT = 0.5
LR = 0.1
VOCABULARY = 20


def adapt(model: nn.Module, *targets: str) -> Any:
    config = hra_fx.HRAConfig(r=4, init_weights=False, target_modules=list(targets))
    return hra_fx.transform(model.double(), config)


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return adapt(BertForSequenceClassification(config), "query", "value")


def bert_with_a_mean_loss() -> Any:
    """The Trainer divides the loss of this model, because it does not accept `num_items_in_batch`."""
    model = bert()
    model.accepts_loss_kwargs = False
    return model


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return adapt(LlamaForCausalLM(config), "q_proj", "v_proj")


MODELS = {"llama": llama, "bert": bert, "bert with a mean loss": bert_with_a_mean_loss}


def samples(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(3, VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens if isinstance(model, LlamaForCausalLM) else tokens[:, 0] % 2
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in data]) for key in data[0]}


def trainer_of(
    kind: type[Trainer],
    model: nn.Module,
    folder: Path,
    data: list[dict[str, Tensor]],
    arguments: dict[str, Any] | None = None,
    **further: Any,
) -> Trainer:
    """SGD of a constant rate and without clipping: a step is the gradient."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(settings | (arguments or {}))),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, schedule),
        **further,
    )


def trained_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".hra_u." in name}


def penalty(model: nn.Module) -> Tensor:
    """The term in float64, from its formula."""
    total = torch.zeros((), dtype=torch.float64)
    for vectors in trained_vectors(model).values():
        columns = vectors.double() / vectors.double().square().sum(dim=0).sqrt()
        total = total + (columns.mT @ columns - torch.eye(columns.shape[1])).square().sum().sqrt()
    return total


def gradients_of_penalty(model: nn.Module) -> dict[str, Tensor]:
    vectors = trained_vectors(model)
    return dict(zip(vectors, torch.autograd.grad(penalty(model), list(vectors.values())), strict=True))


def check_the_term_counts_once(model: nn.Module, folder: Path, steps: int, batches: int, **further: Any) -> None:
    """One step from the same start with and without the term: what differs is the term's own step."""
    stock, ours = copy.deepcopy(model), copy.deepcopy(model)
    data = samples(model, 2 * batches)
    arguments = {"gradient_accumulation_steps": steps}
    trainer_of(Trainer, stock, folder, data, arguments, **further).train()
    trainer = trainer_of(HRATrainer, ours, folder, data, arguments, orthogonality_weight=WEIGHT, **further)
    trainer.train()
    assert trainer.state.global_step == 1
    without, having = trained_vectors(stock), trained_vectors(ours)
    for name, gradient in gradients_of_penalty(model).items():
        assert float((without[name] - trained_vectors(model)[name]).detach().norm()) > 1e-8, "the task has a step too"
        assert relative_error(having[name] - without[name], -LR * WEIGHT * gradient) < 1e-12


@pytest.mark.parametrize(
    ("kind", "steps", "batches"),
    [
        ("llama", 1, 1),
        ("llama", 4, 2),
        ("bert", 4, 4),
        ("bert with a mean loss", 1, 1),
        ("bert with a mean loss", 4, 2),
    ],
)
def test_the_term_counts_once_per_step_however_many_batches_are_accumulated(
    kind: str, steps: int, batches: int, tmp_path: Path
) -> None:
    check_the_term_counts_once(MODELS[kind](), tmp_path, steps, batches)


@pytest.mark.parametrize("steps", [4])
def test_the_term_counts_once_with_a_loss_function_of_the_users(steps: int, tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    check_the_term_counts_once(bert_with_a_mean_loss(), tmp_path, steps, steps, compute_loss_func=loss_of)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_the_term_counts_once_where_the_user_says_how_the_loss_is_scaled(
    scaled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "loss_is_scaled_for_ga", scaled)
    check_the_term_counts_once(bert(), tmp_path, 4, 4)


@pytest.mark.parametrize("steps", [4])
def test_the_first_step_is_the_one_made_by_hand(steps: int, tmp_path: Path) -> None:
    model = llama()
    before, data = copy.deepcopy(model), samples(model, 8)
    arguments = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
    trainer_of(HRATrainer, model, tmp_path, data, arguments, orthogonality_weight=WEIGHT).train()

    (before(**batch_of(data)).loss + WEIGHT * penalty(before)).backward()
    for name, vectors in trained_vectors(before).items():
        assert vectors.grad is not None
        # Llama computes its loss in float32, whatever its weights are.
        assert relative_error(trained_vectors(model)[name] - vectors, -LR * vectors.grad) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_does_not_contain_the_term(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    data = samples(model, 4)
    stock = trainer_of(Trainer, model, tmp_path, data).evaluate()["eval_loss"]
    assert trainer_of(HRATrainer, model, tmp_path, data, orthogonality_weight=100.0).evaluate()["eval_loss"] == stock


def test_an_evaluation_between_steps_does_not_contain_the_term(tmp_path: Path) -> None:
    model = bert()
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    data = samples(model, 4)
    trainer = trainer_of(HRATrainer, model, tmp_path, data, arguments, orthogonality_weight=100.0)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] == trainer_of(Trainer, model, tmp_path, data).evaluate()["eval_loss"]
    assert max(losses) < 10 < 100 * float(penalty(model).detach())


def test_a_prediction_in_training_mode_does_not_contain_the_term(tmp_path: Path) -> None:
    model = bert().train()
    data = samples(model, 4)
    found = [
        trainer_of(kind, model, tmp_path, data, **weight).prediction_step(model, batch_of(data), True)[0]
        for kind, weight in ((Trainer, {}), (HRATrainer, {"orthogonality_weight": WEIGHT}))
    ]
    assert torch.equal(*found)


def test_outputs_are_returned_with_the_loss(tmp_path: Path) -> None:
    model = bert().train()
    data = samples(model, 4)
    trainer = trainer_of(HRATrainer, model, tmp_path, data, orthogonality_weight=WEIGHT)
    loss, outputs = trainer.compute_loss(model, batch_of(data), return_outputs=True)
    assert outputs.logits.shape == (4, 2)
    assert relative_error(loss, outputs.loss + WEIGHT * penalty(model)) < 1e-14


def test_a_loss_can_be_asked_for_before_training(tmp_path: Path) -> None:
    model = bert().train()
    data = samples(model, 4)
    trainer = trainer_of(
        HRATrainer,
        model,
        tmp_path,
        data,
        orthogonality_weight=WEIGHT,
        compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * 0,
    )
    assert relative_error(trainer.compute_loss(model, batch_of(data)), WEIGHT * penalty(model)) < 1e-14


def test_a_large_weight_makes_the_vectors_orthogonal(tmp_path: Path) -> None:
    reached = {}
    for weight in (0.0, 1.0):
        model = bert()
        start = float(penalty(model).detach())
        data = samples(model, 8)
        trainer_of(HRATrainer, model, tmp_path, data, {"max_steps": 60}, orthogonality_weight=weight).train()
        reached[weight] = float(orthogonality_loss(model).detach())
    assert reached[1.0] < 0.5 * start
    assert reached[1.0] < 0.5 * reached[0.0]


def test_without_a_weight_it_is_the_stock_trainer(tmp_path: Path) -> None:
    models = [bert(), bert()]
    data = samples(models[0], 8)
    arguments = {"max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    histories = []
    for kind, model in zip((Trainer, HRATrainer), models, strict=True):
        trainer = trainer_of(kind, model, tmp_path, data, arguments)
        trainer.train()
        histories.append([(entry.keys(), entry.get("loss")) for entry in trainer.state.log_history])
    assert histories[0] == histories[1]
    for wanted, found in zip(*(trained_vectors(model).values() for model in models), strict=True):
        assert torch.equal(wanted, found)


def test_the_training_logs_have_the_mean_of_the_term(tmp_path: Path) -> None:
    model = bert()
    seen = [float(penalty(model).detach())]

    class Watched(HRATrainer):
        """Keeps the term as it is after each step."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(float(penalty(self.model).detach()))
            return super().training_step(*args, **kwargs)

    arguments = {
        "max_steps": 4,
        "logging_strategy": "steps",
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    trainer = trainer_of(Watched, model, tmp_path, samples(model, 8), arguments, orthogonality_weight=WEIGHT)
    trainer.train()
    before_steps = seen[1:]
    logged = [entry["orthogonality"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(before_steps[:2]) / 2, sum(before_steps[2:]) / 2], rel=1e-13)
    assert [key for entry in trainer.state.log_history if "loss" not in entry for key in entry if "orthog" in key] == []


@pytest.mark.parametrize("weight", [-1e-6, float("nan"), float("inf"), True, "1e-6", None])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(hra_fx.ConfigError) as caught:
        HRATrainer(orthogonality_weight=weight)
    assert str(caught.value) == (
        f"`orthogonality_weight` must be a finite number >= 0, got {weight!r}. Use 0.0 to disable the term, or a small "
        "value such as 1e-6."
    )


def test_a_model_without_reflections_is_refused_with_a_weight_and_trained_without(tmp_path: Path) -> None:
    model = hra_fx.fold(bert())
    model.classifier.requires_grad_(True)
    data = samples(model, 4)
    trainer_of(HRATrainer, model, tmp_path, data).train()
    with pytest.raises(hra_fx.AdapterError, match=r"^BertForSequenceClassification: it has no reflections\."):
        trainer_of(HRATrainer, model, tmp_path, data, orthogonality_weight=WEIGHT).train()


def test_the_package_does_not_import_the_trainer() -> None:
    code = "import sys, hra_fx; hra_fx.transform, hra_fx.fold; assert 'transformers.trainer' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
