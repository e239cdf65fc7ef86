"""TRL's trainers with the distance to the base: a step moves the adapter by its gradient more, for any accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.trl_use.runs import LORA, TAKEN, own_cache, trainer  # noqa: F401
from oracles import relative_error
from tiny_tokenizer import tokenizer
from torch import Tensor
from transformers import set_seed

import hra_fx

# Names that transformers has had since 5.0, and means to rename; PEFT and TRL use them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

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
