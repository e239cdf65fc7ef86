"""`allocate_ranks`: where the ranks go, against dense gradients, and what training makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import picture
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import hra_fx
from hra_fx.errors import AdapterError, ConfigError, UnsupportedLayerError

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


def test_the_layer_that_has_to_turn_gets_the_ranks_and_trains_better() -> None:
    model, path = mlp(), "2"
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


class Experts(nn.Module):
    """Two experts of one parameter, which add up."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (2, 6, 4) if is_transposed else (2, 4, 6)
        self.up = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return sum(torch.tanh(x @ (one if self.is_transposed else one.mT)) for one in self.up)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_have_the_joint_slope_of_a_plane_in_each(is_transposed: bool) -> None:
    from hra_fx.model.allocate import _gradients, _slopes
    from hra_fx.selection.parameters import targeted_parameters

    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(is_transposed)})
    fields = hra_fx.HRAConfig(target_parameters=["experts.up"])
    layers = targeted_parameters(model, fields)
    x = torch.randn(8, 6, dtype=torch.float64)
    experts = model["experts"]
    [gradient] = _gradients(experts, layers, [x], lambda output, _: output.square().mean()).values()
    found = _slopes(layers["experts.hra_up"], gradient, 6)
    skew = torch.zeros(2, 6, 6, dtype=torch.float64, requires_grad=True)
    q, weight = torch.linalg.matrix_exp(skew - skew.mT), experts.up.detach()
    rotated = q.mT @ weight if is_transposed else weight @ q
    output = torch.func.functional_call(experts, {"up": rotated}, (x,))
    (slope,) = torch.autograd.grad(output.square().mean(), skew)
    wanted = torch.linalg.svdvals(slope)[:, ::2].square().sum(0).sqrt()
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-3, atol=1e-6)


def test_the_budget_counts_every_expert() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6).double(), Experts(False))
    fields = hra_fx.HRAConfig(target_modules=["0"], target_parameters=["1.up"])
    with pytest.raises(ConfigError, match="`budget` must be an int >= 36, for two vectors in each of the 2 layers"):
        hra_fx.allocate_ranks(model, fields, [], 35)
    x = torch.randn(8, 6, dtype=torch.float64)
    chosen = hra_fx.allocate_ranks(model, fields, [x], 72, loss=lambda output, _: output.square().mean())
    adapted = hra_fx.transform(model, chosen)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) in (60, 72)


def test_other_uses_of_a_shared_weight_do_not_count() -> None:
    """As in a model whose layers have equal weights of their own."""
    from hra_fx.model.allocate import _gradients

    alone: Any = mlp(2)
    alone[2].weight = nn.Parameter(alone[0].weight.detach().clone())
    shared: Any = copy.deepcopy(alone)
    shared[2].weight = weight = shared[0].weight
    x = torch.randn(16, WIDTH)
    wanted = torch.autograd.grad(alone(x).square().mean(), [alone[0].weight, alone[2].weight])
    found = _gradients(shared, {"0": shared[0], "2": shared[2]}, [x], lambda output, _: output.square().mean())
    torch.testing.assert_close(tuple(found.values()), wanted)
    assert shared[0].weight is shared[2].weight is weight


def test_the_rank_that_is_replaced_does_not_have_to_fit() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    fields = hra_fx.HRAConfig(r=8, target_modules=["0"], apply_GS=True, rank_pattern={"1": 3})
    chosen = hra_fx.allocate_ranks(model, fields, [x], 8, loss=lambda output, _: output.square().mean())
    assert (chosen.r, chosen.rank_pattern) == (2, {"0": 2})


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
    with pytest.raises(AdapterError, match="the layers got no gradients from 0 batches"):
        hra_fx.allocate_ranks(mlp(), config(), [], 256)
    x = torch.randn(2, WIDTH)
    with pytest.raises(AdapterError, match=r"but the attribute `loss` of Tensor is None\. Put labels into the batches"):
        hra_fx.allocate_ranks(mlp(), config(), [x], 256)
    with pytest.raises(AdapterError, match=r"but the result of `loss` is a tensor of shape \(2, 32\)\. Put labels"):
        hra_fx.allocate_ranks(mlp(), config(), [x], 256, loss=lambda output, _: output)
    with pytest.raises(AdapterError, match="the layers got no gradients from 1 batches"):
        hra_fx.allocate_ranks(mlp(), config(), [x], 256, loss=lambda *_: torch.ones(()))
    with pytest.raises(AdapterError, match="0: the gradient of its weight is not finite"):
        hra_fx.allocate_ranks(mlp(), config(), [x * torch.inf], 256, loss=lambda output, _: output.mean())


def test_quantized_weights_are_refused() -> None:
    model = mlp().eval()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedLayerError, match="0: its weight is quantized and does not get a gradient"):
        hra_fx.allocate_ranks(model, config(), [torch.randn(2, WIDTH)], 256)
