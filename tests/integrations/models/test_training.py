"""Gradients of the vectors and of the input, and a few steps of training."""

from __future__ import annotations

import pytest
import torch
from integrations.models.zoo import EVERY, Case, adapted, assert_same, run_oracle, tensors, vectors_of
from torch import Tensor, nn

every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def loss_of(output: object) -> Tensor:
    """A scalar that depends on every value of an output."""
    terms = [
        (tensor * torch.linspace(-1, 1, tensor.numel()).double().view_as(tensor)).sum() for tensor in tensors(output)
    ]
    return torch.stack(terms).sum()


def gradients(loss: Tensor, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*vectors_of(model).values(), *inputs.values()]))


@every
def test_gradients(case: Case) -> None:
    base, model = adapted(case)
    for training in (False, True):
        base.train(training)
        model.train(training)
        inputs = {name: value.requires_grad_() for name, value in case.floats(2, case.sizes[0]).items()}
        torch.manual_seed(4)
        actual = gradients(loss_of(model(**inputs)), model, inputs)
        torch.manual_seed(4)
        expected = gradients(loss_of(run_oracle(base, model, inputs)), model, inputs)
        assert sum(bool(gradient.abs().max() > 0) for gradient in actual) > len(actual) // 2
        assert_same(actual, expected, rtol=1e-8)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".hra_u." in name
    }


@pytest.mark.slow
@every
def test_a_few_steps_of_sgd(case: Case) -> None:
    """Three steps of the model and of the oracle give the same vectors."""
    runs = []
    for use_oracle in (False, True):
        base, model = adapted(case)
        base.train()
        model.train()
        # Normalized batches of two values are signs, which rounding can flip: use more and larger images.
        inputs = case.floats(4, case.sizes[1])
        optimizer = torch.optim.SGD(vectors_of(model).values(), lr=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            output = run_oracle(base, model, inputs) if use_oracle else model(**inputs)
            torch.stack([tensor.square().mean() for tensor in tensors(output)]).sum().backward()
            optimizer.step()
        runs.append([vectors.detach() for vectors in vectors_of(model).values()])
    assert_same(runs[0], runs[1], rtol=1e-8)
