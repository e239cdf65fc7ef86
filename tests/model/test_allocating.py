"""`allocate_ranks`: where the ranks go, against dense gradients, and what training makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, ConfigError

WIDTH = 32


def mlp(layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        layer = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(layer.weight, 1.2)  # so that all layers have the same effect
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts)


def config(*targets: str) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(target_modules=list(targets or ("0", "2", "4", "6")))


def turned(model: nn.Module, path: str, pairs: int) -> nn.Module:
    """The model with one weight rotated in some planes."""
    teacher: Any = copy.deepcopy(model)
    weight = teacher.get_submodule(path).weight
    basis = torch.linalg.qr(torch.randn(WIDTH, 2 * pairs, dtype=weight.dtype)).Q
    turn = torch.linalg.matrix_exp(0.8 * (basis[:, ::2] @ basis[:, 1::2].mT - basis[:, 1::2] @ basis[:, ::2].mT))
    with torch.no_grad():
        weight.copy_(weight @ turn)
    return teacher


def towards(teacher: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, x: (output - teacher(x).detach()).square().mean()


@pytest.mark.parametrize("path", ["0", "2", "6"])
def test_the_layer_that_has_to_turn_gets_the_ranks_and_trains_better(path: str) -> None:
    model = mlp()
    teacher = turned(model, path, 4)
    loss = towards(teacher)
    batches = [torch.randn(128, WIDTH) for _ in range(4)]
    budget = 4 * 4 * WIDTH
    before = picture(model)
    chosen = hra_fx.allocate_ranks(model, config(), batches, budget, loss=loss)
    assert picture(model) == before
    ranks = {layer: chosen.rank_of(layer) for layer in ("0", "2", "4", "6")}
    assert ranks[path] == max(ranks.values()) > 4
    assert sum(ranks.values()) * WIDTH == budget
    assert all(rank % 2 == 0 for rank in ranks.values())
    uniform = hra_fx.HRAConfig(r=4, target_modules=["0", "2", "4", "6"])
    assert trained(model, chosen, loss, batches) < 0.8 * trained(model, uniform, loss, batches)


def trained(base: nn.Module, fields: hra_fx.HRAConfig, loss: Any, batches: list[Tensor]) -> float:
    """The loss after training, for the same number of vectors."""
    torch.manual_seed(1)
    model = hra_fx.transform(copy.deepcopy(base), fields)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(tensor.numel() for tensor in vectors) == 4 * 4 * WIDTH
    optimizer = torch.optim.Adam(vectors, lr=1e-2)
    for step in range(300):
        optimizer.zero_grad()
        loss(model(batches[step % 4]), batches[step % 4]).backward()
        optimizer.step()
    return sum(float(loss(model(x), x).detach()) for x in batches)


def test_slopes_are_those_of_the_loss_along_rotations() -> None:
    """The gain of a plane is the derivative of the loss along its angle, of Q as a dense rotation."""
    from hra_fx.model.allocate import _gradients, _slopes

    model = mlp(2).double()
    loss = towards(turned(model, "0", 3))
    torch.manual_seed(2)
    x = torch.randn(32, WIDTH, dtype=torch.float64)
    layer: Any = model[0]
    found = _slopes(layer, _gradients(model, {"0": layer}, [x], loss)["0"], 6)
    weight = layer.weight.detach()
    skew = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
    q = torch.linalg.matrix_exp(skew - skew.mT)
    output = torch.func.functional_call(model, {"0.weight": weight @ q}, (x,))
    (gradient,) = torch.autograd.grad(loss(output, x), skew)
    wanted = torch.linalg.svdvals(gradient)[:6:2]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-3, atol=1e-6)


class Model(nn.Module):
    """Returns an output with a loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.head(self.conv(x).mean(-1))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize("kind", [dict, tuple])
def test_batches_and_the_loss_of_the_output(kind: type) -> None:
    parts = {"x": torch.randn(8, 4, 9), "labels": torch.arange(8) % 2}
    batch = parts if kind is dict else tuple(parts.values())
    chosen = hra_fx.allocate_ranks(Model(), hra_fx.HRAConfig(target_modules=["conv", "head"]), [batch], budget=108)
    ranks = {path: chosen.rank_of(path) for path in ("conv", "head")}
    assert 12 * ranks["conv"] + 6 * ranks["head"] <= 108
    assert min(ranks.values()) >= 2


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"`budget` must be an int >= 256, for two vectors in each of the 4 layers"):
        hra_fx.allocate_ranks(mlp(), config(), [], 255)
    with pytest.raises(AdapterError, match="no gradient reaches any of the layers in 0 batches"):
        hra_fx.allocate_ranks(mlp(), config(), [], 256)
