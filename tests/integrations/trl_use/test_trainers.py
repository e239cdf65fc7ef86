"""TRL's trainers: models after `from_peft` and transformed models train as PEFT's HRA does, with the same reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.trl_use.runs import (
    LORA,
    NAMED,
    OURS,
    PEFT,
    TAKEN,
    base_model,
    logs,
    own_cache,  # noqa: F401
    redraw,
    trainer,
    vectors_of,
)
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from tiny_tokenizer import tokenizer
from torch import Tensor
from transformers import set_seed

import hra_fx

# Names that transformers has had since 5.0, and means to rename; PEFT and TRL use them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

SLOW_OURS = pytest.param(OURS, marks=pytest.mark.slow)


def trained_alike(
    kind: str, method: str, folder: Path, *keys: str, ours: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """The trainers of PEFT and of `kind`, after the same training."""
    own = (ours or {}) if kind == OURS else {}
    theirs, fast = trainer(PEFT, method, folder, **options), trainer(kind, method, folder, **(options | own))
    train_alike(theirs, fast, *keys)
    return theirs, fast


def train_alike(theirs: Any, fast: Any, *keys: str) -> None:
    """Train both; their logs and vectors agree."""
    before = {name: vectors.detach().clone() for name, vectors in vectors_of(fast.model).items()}
    for one in (theirs, fast):
        set_seed(0)  # GRPO samples
        one.train()
    got, logged = (torch.tensor(logs(one, "loss", *keys)) for one in (fast, theirs))
    torch.testing.assert_close(got, logged, rtol=1e-4, atol=1e-5)
    wanted = vectors_of(theirs.model)
    assert len(wanted) == 6
    for name, vectors in vectors_of(fast.model).items():
        moved, as_theirs = vectors - before[name], wanted[name] - before[name]
        assert float(as_theirs.detach().norm()) > 1e-4, name
        assert relative_error(moved, as_theirs) < 1e-2, name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(OURS, {}, marks=pytest.mark.slow),
        (TAKEN, {"assistant_only_loss": True, "packing": True}),
        *(
            pytest.param(
                kind,
                {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": kind == TAKEN}},
                marks=pytest.mark.slow,
            )
            for kind in (OURS, TAKEN)
        ),
    ],
    ids=["plain", "packed, assistant only", "checkpointed", "checkpointed, reentrant"],
)
def test_sft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    _, fast = trained_alike(kind, "SFT", tmp_path, "mean_token_accuracy", **options)
    layer = fast.model.get_submodule(("" if kind == OURS else "base_model.model.") + "model.layers.0.mlp.down_proj")
    assert not isinstance(layer, HRALinear)


@pytest.mark.needs("peft>=0.21")  # PEFT 0.18 stops training its HRA layers in the reference
@pytest.mark.parametrize("kind", [pytest.param(TAKEN, marks=pytest.mark.slow), OURS])
def test_dpo_with_the_base_model_as_its_reference(kind: str, tmp_path: Path) -> None:
    keys = ("rewards/chosen", "rewards/rejected", "logps/chosen")  # rewards are relative to the reference
    _, fast = trained_alike(kind, "DPO", tmp_path, *keys, ours={"precompute_ref_log_probs": True})
    rewards = logs(fast, *keys)
    assert rewards[0][0] == pytest.approx(0, abs=1e-5)
    assert abs(rewards[-1][0]) > 1e-3
    assert fast.ref_model is None


@pytest.mark.needs("peft>=0.21")  # as above
@pytest.mark.parametrize("kind", [TAKEN, SLOW_OURS, pytest.param(NAMED, marks=pytest.mark.slow)])
def test_grpo(kind: str, tmp_path: Path) -> None:
    """With a penalty for the distance from the base model, which TRL knows of a PeftModel only.

    It asks for a second model if it is made with `beta`, and reads the attribute at each step.
    """
    beta = 0.0 if kind == OURS else 0.5
    theirs = trainer(PEFT, "GRPO", tmp_path, beta=beta)
    other = trainer(kind, "GRPO", tmp_path, beta=beta if kind == TAKEN else 0.0)
    other.beta = beta
    train_alike(theirs, other, *(["kl"] if beta else []), "reward")
    assert other.ref_model is None
    assert not beta or logs(other, "kl")[-1][0] > 1e-6


@pytest.mark.slow
@pytest.mark.needs("trl>=1.16")
@pytest.mark.parametrize("kind", [TAKEN, OURS])
def test_reward(kind: str, tmp_path: Path) -> None:
    theirs, fast = trained_alike(kind, "reward", tmp_path, "margin")
    head = "base_model.model.score.modules_to_save.default"
    wanted = theirs.model.get_submodule(head).weight
    found = fast.model.get_submodule("score" if kind == OURS else "base_model.model.score").weight
    assert found.requires_grad
    assert relative_error(found, wanted) < 1e-4
    assert relative_error(found, base_model("reward").score.weight) > 1e-3


@pytest.mark.parametrize("method", ["SFT", *(pytest.param(one, marks=pytest.mark.slow) for one in ("DPO", "GRPO"))])
def test_a_run_is_resumed_and_served(method: str, tmp_path: Path) -> None:
    """As in docs/trl.md: with `from_peft` after the trainer is made, the rest is TRL's own script."""
    options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole, again = (trainer(TAKEN, method, tmp_path / "run", **options) for _ in range(2))
    redraw(again.model)
    for one, checkpoint in ((whole, None), (again, str(tmp_path / "run" / "checkpoint-2"))):
        set_seed(0)
        one.train(resume_from_checkpoint=checkpoint)
    torch.testing.assert_close(vectors_of(again.model), vectors_of(whole.model), rtol=0, atol=0)
    whole.save_model(str(tmp_path / "adapter"))
    served = peft.PeftModel.from_pretrained(base_model("SFT"), tmp_path / "adapter")
    ids = torch.tensor([[3, 5, 6, 7, 4, 10]])
    assert relative_error(served.eval()(ids).logits, whole.model.eval()(ids).logits) < 1e-5


# ---- with the distance to the base: a step moves the adapter by its gradient more, for any accumulation ----

RATE, WEIGHT = 0.1, 2.0


def trained(model: Any) -> Tensor:
    return torch.cat([one.detach().flatten() for one in model.parameters() if one.requires_grad])


def moved(made: Any) -> Tensor:
    """By one step of SGD from adapters that are not the identity."""
    torch.manual_seed(1)
    with torch.no_grad():
        for one in made.model.parameters():
            if one.requires_grad:
                one.add_(0.3 * torch.randn_like(one))
    before = trained(made.model)
    set_seed(0)  # GRPO samples
    made.train()
    return trained(made.model) - before


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (TAKEN, "SFT"),
        *(pytest.param(LORA, method, marks=pytest.mark.slow) for method in ("SFT", "DPO")),
        *(pytest.param(TAKEN, method, marks=pytest.mark.slow) for method in ("DPO", "GRPO", "reward")),
    ],
)
def test_a_step_has_the_gradient_of_the_distance(kind: str, method: str, accumulated: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 1, "learning_rate": RATE, "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    plain, added = (trainer(kind, method, tmp_path, **options) for _ in range(2))
    if method == "reward":
        samples = [{"input_ids": torch.tensor([[5, 6, 7, 8]])}]
    else:
        samples = hra_fx.own_texts(added.model, 2, 8, 2, tokenizer=tokenizer())
    hra_fx.add_distance_to_base(added, samples, WEIGHT)
    found = moved(added) - moved(plain)

    start = trainer(kind, method, tmp_path, **options)
    start.train = lambda: hra_fx.distance_to_base(start.model, samples[0]).backward()
    assert not moved(start).any()
    gradients = [one.grad.flatten() for one in start.model.parameters() if one.grad is not None]
    assert relative_error(found, -RATE * WEIGHT * torch.cat(gradients)) < 1e-3
    losses = [one.state.log_history[0]["loss"] for one in (added, plain)]
    assert losses[0] - losses[1] == pytest.approx(
        WEIGHT * float(hra_fx.distance_to_base(start.model, samples[0]).detach()), rel=1e-3
    )
