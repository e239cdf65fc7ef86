"""Quiet pairs: differences are orthogonal to the main inputs of the training data. Vectors without rows."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import relative_error
from torch import Tensor
from torch.func import functional_call
from training.test_pairs import F64, AdamW, C, adapted, base, explicit_pairs, loss_of, vectors_of

import hra_fx
from hra_fx import AdapterError, ConfigError, train_pairs
from hra_fx.functional.pairs import from_pairs, to_pairs


def main_inputs(rows: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(rows.mT @ rows).eigenvectors[:, -count:]


@pytest.mark.parametrize("protect_first", [True, False, None])
def test_differences_are_orthogonal_to_the_main_inputs(protect_first: bool | None) -> None:
    """The oracle projects differences that are parameters. Protected directions stay exact beside it."""
    model, plain, x, kept = adapted(r=2), base(), torch.randn(9, 6).to(F64), torch.randn(7, 6).to(F64)
    explicit = copy.deepcopy(model)
    optimizer = AdamW(vectors_of(model).values())
    if protect_first:
        hra_fx.protect(optimizer, model, [kept], 1)
    train_pairs(optimizer, model, C, batches=[x[:4], x[4:]], directions=2)
    if protect_first is False:
        hra_fx.protect(optimizer, model, [kept], 1)
    inputs = {"0.hra_u.default": (x, kept), "2.hra_u.default": (plain[:2](x), plain[:2](kept))}
    held, now = explicit_pairs(explicit)
    steps = AdamW(held)
    for step in range(3):
        for each, own in ((model, optimizer), (lambda x: functional_call(explicit, now(), x), steps)):
            own.zero_grad()
            loss_of(each, step).backward()
            own.step()
        for (_, d), (rows, _) in zip(zip(held[::2], held[1::2], strict=True), inputs.values(), strict=True):
            main = main_inputs(rows, 2)
            d.data -= main @ (main.mT @ d.data)
    for name, vectors in vectors_of(model).items():
        rows, protected = inputs[name]
        if protect_first is None:
            assert relative_error(vectors.detach(), now()[name].detach()) < 1e-9
            assert (main_inputs(rows, 2).mT @ (vectors[:, ::2] - vectors[:, 1::2])).abs().max() < 1e-10
        else:
            assert (main_inputs(protected, 1).mT @ vectors).abs().max() < 1e-12


def test_directions_of_pairs_are_checked() -> None:
    model = adapted()
    optimizer = AdamW(vectors_of(model).values())
    for directions, error in ((0, "a positive int, got 0"), (4, r"at most half of the width .* got 4 for 0\.hra_u")):
        with pytest.raises(ConfigError, match=rf"^`directions` must be {error}"):
            train_pairs(optimizer, model, batches=[torch.randn(2, 6).to(F64)], directions=directions)
    with pytest.raises(AdapterError, match=r"^`batches` is empty"):
        train_pairs(optimizer, model, batches=[], directions=1)


@pytest.mark.parametrize("rows", [0, 5])
def test_from_pairs_is_the_inverse_even_without_rows(rows: int) -> None:
    """With sharded vectors, a process may have no rows of a layer."""
    vectors = torch.randn(2, rows, 4, dtype=F64)
    torch.testing.assert_close(from_pairs(to_pairs(vectors.clone(), 1.5, 0.3), 1.5, 0.3), vectors)
