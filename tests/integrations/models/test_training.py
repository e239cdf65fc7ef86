"""Gradients of the vectors and of the input, gradient checkpointing, and a few steps of training."""

from __future__ import annotations

import pytest
import torch
from integrations.models.zoo import EVERY, HUGGING, Case, adapted, assert_same, run_oracle, tensors, vectors_of
from torch import Tensor, nn

every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def loss_of(output: object) -> Tensor:
    """A number that depends on every value of an output."""
    terms = [
        (tensor * torch.linspace(-1, 1, tensor.numel()).double().view_as(tensor)).sum() for tensor in tensors(output)
    ]
    return torch.stack(terms).sum()


def gradients(loss: Tensor, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*vectors_of(model).values(), *inputs.values()]))


@every
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients(case: Case, training: bool) -> None:
    base, model = adapted(case)
    base.train(training)
    model.train(training)
    inputs = {name: value.requires_grad_() for name, value in case.floats(2, case.sizes[0]).items()}
    torch.manual_seed(4)
    actual = gradients(loss_of(model(**inputs)), model, inputs)
    torch.manual_seed(4)
    expected = gradients(loss_of(run_oracle(base, model, inputs)), model, inputs)
    assert sum(bool(gradient.abs().max() > 0) for gradient in actual) > len(actual) // 2
    assert_same(actual, expected, rtol=1e-8)


@every
def test_only_vectors_train(case: Case) -> None:
    _, model = adapted(case)
    model.train()
    loss_of(model(**case.floats(2, case.sizes[0]))).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name in dict(model.named_parameters()) if ".hra_u." in name}


@pytest.mark.parametrize("case", HUGGING, ids=lambda case: case.name)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    _, model = adapted(case)
    model.train()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    inputs = {name: value.requires_grad_() for name, value in case.floats(2, case.sizes[0]).items()}
    calls: list[str] = []
    for path in vectors_of(model):
        model.get_submodule(path).hra_u.register_forward_hook(lambda *_, path=path: calls.append(path))
    results, counts = [], []
    for checkpointing in (False, True):
        if checkpointing:
            # The later name, where transformers has it: the earlier one warns there.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        calls.clear()
        model.zero_grad()
        torch.manual_seed(5)
        loss = loss_of(model(**inputs))
        grown = list(vectors_of(model).values())
        for value in inputs.values():
            value.grad = None
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in grown), *(value.grad.clone() for value in inputs.values())])
        counts.append({path: calls.count(path) for path in vectors_of(model)})
    assert_same(results[1], [tensor.clone() for tensor in results[0]])
    assert set(counts[0].values()) == {1}
    inside = {path for path in counts[1] if "layer" in path or "block" in path}
    assert {path for path, count in counts[1].items() if count == 2} == inside


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_a_few_steps_of_sgd(case: Case) -> None:
    """The model and the oracle, each with vectors of its own, stay together over three steps."""
    runs = []
    for use_oracle in (False, True):
        base, model = adapted(case)
        base.train()
        model.train()
        # Batch statistics of two values are signs, which rounding turns: more images, larger ones.
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
