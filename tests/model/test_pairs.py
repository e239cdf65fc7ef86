"""`train_pairs` compared with the same optimizer over sums and differences that are parameters themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from integrations.peft_acceleration.layers import accelerated, adapted as peft_adapted
from model.pair_steps import (
    BY_ROWS,
    F64,
    OPTIMIZERS,
    AdamW,
    adapted,
    base,
    by_oracle,
    by_pairs,
    loss_of_experts,
    off_start,
    same,
)
from moe_models import built, experts_config

import hra_fx
from hra_fx.functional.householder import init_vectors
from hra_fx.functional.pairs import start_length


@pytest.mark.parametrize("name", [*OPTIMIZERS, *BY_ROWS])
def test_steps_are_those_of_sums_and_differences(name: str) -> None:
    joint = name in BY_ROWS
    model = adapted()
    wanted = by_oracle(copy.deepcopy(model), (OPTIMIZERS | BY_ROWS)[name], joint=joint)
    # transformers' Adafactor computes with float32.
    same(by_pairs(model, (OPTIMIZERS | BY_ROWS)[name]), wanted, 1e-6 if name.startswith("transformers") else 1e-12)


def test_experts_and_layers_of_peft() -> None:
    experts = off_start(hra_fx.transform(built("mixtral", implementation="eager"), experts_config()))
    same(by_pairs(copy.deepcopy(experts), AdamW, loss_of_experts), by_oracle(experts, AdamW, loss_of_experts))
    for make in (peft_adapted, accelerated):
        model = make(base(), "0", "2")
        same(by_pairs(copy.deepcopy(model), AdamW), by_oracle(model, AdamW), 1e-6)


def test_a_vector_starts_at_length_one() -> None:
    """So a rate is that of unit vectors: `L` is the length that `init_vectors` draws."""
    torch.manual_seed(0)
    for r in (2, 8):
        drawn = init_vectors(4096, r, apply_GS=False, init_weights=True, dtype=F64)[0]
        assert float(drawn.norm(dim=0).square().mean().sqrt()) == pytest.approx(start_length(4096, r), rel=0.02)
