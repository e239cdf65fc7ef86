"""Main directions against an eigendecomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hra_fx.functional.directions import Sketch


def made(x: Tensor, directions: int, batch: int = 64) -> Sketch:
    sketch = Sketch(x.shape[1], directions, x.device)
    for rows in x.split(batch):
        sketch.add(rows)
    return sketch


def energy(x: Tensor, basis: Tensor) -> float:
    return float((x.double() @ basis.double()).square().sum())


def inputs() -> Tensor:
    """Inputs whose energy falls slowly from direction to direction, as in language models."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(384, 384)).Q
    return torch.randn(1024, 384) * torch.arange(1, 385) ** -0.5 @ turned


@pytest.mark.parametrize("processes", [1, 3])
def test_the_directions_hold_nearly_the_energy_of_the_best_ones(processes: int) -> None:
    x = inputs()
    best = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors[:, -16:]
    parts = [made(part, 16) for part in x.chunk(processes)]
    parts[0].merge(torch.stack([part.values for part in parts]), torch.stack([part.energy for part in parts]))
    basis = parts[0].basis(16)
    torch.testing.assert_close(basis.T @ basis, torch.eye(16).double())
    assert energy(x, basis) > 0.99 * energy(x, best)
    share = energy(x, basis) / float(x.double().square().sum())
    assert 0.97 * share < parts[0].share(basis) <= share + 1e-9


def test_few_independent_vectors_are_in_the_span() -> None:
    torch.manual_seed(0)
    x = (100 ** torch.randn(100, 5).double()) @ torch.randn(5, 384).double()
    basis = made(x, 16).basis(16)
    assert int(basis.any(dim=0).sum()) == 5
    torch.testing.assert_close(x @ basis @ basis.T, x)


def test_vectors_in_the_span_of_earlier_directions_give_no_new_ones() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 256)
    earlier = made(first, 8).basis(8).float()[:, :4]
    basis = made(torch.cat([first, second]), 12).basis(8, earlier)
    used = basis[:, basis.any(dim=0)]
    assert used.shape[1] == 8
    torch.testing.assert_close(used.T @ used, torch.eye(8).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(second.double() @ used @ used.T, second.double(), atol=1e-5, rtol=1e-5)
    assert not made(first, 12).basis(8, earlier)[:, 4:].any()
