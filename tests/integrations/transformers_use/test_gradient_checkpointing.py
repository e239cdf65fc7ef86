"""Activations that are computed again in the backward: the gradients are those of a model that keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import relative_error
from tiny_models import BASES, adapted, batch, pairs, turn
from torch import Tensor
from torch.utils import checkpoint

# The names that transformers has had since 5.0; it means to rename them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning",
)


def gradients(kind: str, model: Any) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(3)
    model(**batch(kind)).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in found.items() if gradient is None] == []
    return found


def enable(model: Any, *, use_reentrant: bool) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call that checkpoints."""
    calls: list[bool] = []

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["use_reentrant"])
        return checkpoint.checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    return calls


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pairs
def test_the_gradients_are_those_without(
    kind: str, shape: str, use_reentrant: bool, when: str, recomputed: list[bool]
) -> None:
    plain = adapted(kind, shape)
    turn(plain)
    wanted = gradients(kind, plain)
    assert recomputed == []

    base = BASES[kind]()
    if when == "before":
        enable(base, use_reentrant=use_reentrant)
    model = adapted(kind, shape, base=base)
    if when == "after":
        enable(model, use_reentrant=use_reentrant)
    turn(model)
    found = {name: gradient.clone() for name, gradient in gradients(kind, model).items()}
    assert recomputed == [use_reentrant] * 2, "one for each block"
    model.zero_grad()
    model.gradient_checkpointing_disable()
    gradients(kind, model)
    assert len(recomputed) == 2
    assert wanted.keys() == found.keys()
    assert {name: error for name in wanted if (error := relative_error(found[name], wanted[name])) > 1e-5} == {}
