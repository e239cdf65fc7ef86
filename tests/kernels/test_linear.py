"""An adapted Linear under autocast, checkpointing and higher derivatives, against the dense oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_layer import BF16, F32, F64, adapted, normal
from oracles import dense_q, relative_error
from torch import Tensor, nn


def oracle(x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    turned = weight.double() @ dense_q(vectors)
    return nn.functional.linear(x.double(), turned, None if bias is None else bias.double())


def leaf(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return normal(seed, *shape, dtype=dtype).requires_grad_()


def check_narrow(output: Tensor, x: Tensor, vectors: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Output and gradients of a bfloat16 layer with float32 vectors."""
    wanted = oracle(x, vectors, weight, bias)
    assert output.dtype == BF16
    assert relative_error(output, wanted) < 6e-3
    upstream = normal(4, *output.shape, dtype=BF16)
    found = torch.autograd.grad(output, (x, vectors), upstream)
    assert [gradient.dtype for gradient in found] == [BF16, F32]
    for one, other in zip(found, torch.autograd.grad(wanted, (x, vectors), upstream.double()), strict=True):
        assert relative_error(one, other) < 6e-3


def frozen(layer: nn.Module | None = None, r: int = 4) -> Any:
    model = adapted(layer or nn.Linear(12, 6, dtype=F64), r)
    model.requires_grad_(False)
    model[0].hra_u["default"].requires_grad_()
    return model


def test_the_output_under_autocast() -> None:
    model = frozen(nn.Linear(12, 6))
    with torch.autocast("cpu", dtype=BF16):
        output = model(normal(1, 3, 12, dtype=F32))
    assert output.dtype == BF16


def test_a_weight_with_columns() -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = frozen(Conv1D(6, 12).double()), leaf(1, 3, 12)
    output = model(x)
    wanted = oracle(x, model[0].hra_u["default"], model[0].hra_base.mT, model[0].bias)
    assert relative_error(output, wanted) < 1e-12


def test_gradient_checkpointing_gives_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = frozen(), leaf(1, 300, 12)
    plain = torch.autograd.grad(model(x).square().sum(), (x, model[0].hra_u["default"]))
    again = checkpoint(model, x, use_reentrant=False)
    for one, other in zip(
        plain, torch.autograd.grad(again.square().sum(), (x, model[0].hra_u["default"])), strict=True
    ):
        assert torch.equal(one, other)


class Twice(nn.Module):
    """A layer that is called twice, the second time with its own output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc(torch.tanh(self.fc(x)))
        return output


@pytest.mark.parametrize("rows", [4, 600])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_second_derivatives_of_a_layer_that_is_called_twice(rows: int, trained: bool, wants_gradient: bool) -> None:
    model = frozen(nn.Linear(8, 8, dtype=F64))
    model[0].hra_base.requires_grad_(trained)
    x, vectors = normal(1, rows, 8).requires_grad_(wants_gradient), model[0].hra_u["default"]
    loss = Twice(model[0])(x).square().sum()
    found = torch.autograd.grad(loss, vectors, create_graph=True)[0]

    def plain(u: Tensor) -> Tensor:
        middle = torch.tanh(oracle(x, u, model[0].hra_base, model[0].bias))
        return oracle(middle, u, model[0].hra_base, model[0].bias).square().sum()

    sought = torch.autograd.grad(plain(vectors), vectors, create_graph=True)[0]
    assert relative_error(found, sought) < 1e-10
    again, wanted = (torch.autograd.grad(one.square().sum(), vectors)[0] for one in (found, sought))
    assert relative_error(again, wanted) < 1e-9


@pytest.mark.parametrize("rows", [4, 600])
def test_a_narrow_model_under_autocast_of_its_dtype(rows: int) -> None:
    model = frozen(nn.Linear(96, 64, dtype=BF16), 8)
    x, vectors = leaf(1, rows, 96, dtype=BF16), model[0].hra_u["default"]
    with torch.autocast("cpu", dtype=BF16):
        output = model(x)
    check_narrow(output, x, vectors, model[0].hra_base, model[0].bias)


def test_float64_under_autocast() -> None:
    model = frozen(nn.Linear(12, 6, dtype=F64))
    box = model[0].hra_u
    box["default"].data = box["default"].data.float()
    x = normal(1, 3, 12)
    with torch.autocast("cpu", dtype=BF16):
        output = model(x)
    assert relative_error(output, oracle(x, box["default"], model[0].hra_base, model[0].bias)) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_in_a_batch(trained: bool) -> None:
    model, x = frozen(), normal(1, 2, 12)
    model[0].hra_base.requires_grad_(trained)
    found = torch.autograd.functional.jacobian(model, x, vectorize=True)
    turned = model[0].hra_base @ dense_q(model[0].hra_u["default"])
    assert relative_error(found[0, :, 0], turned) < 1e-12
    assert relative_error(found[1, :, 1], turned) < 1e-12
