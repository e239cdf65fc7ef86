"""Layers with a forward of their own, attentions, and models whose forward depends on settings or gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from layers.checking import assert_same, normal, pair, run_dense
from torch import Tensor, fx, nn
from torch.nn import functional as F

import hra_fx

X = normal(1, 5, 6)


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_plain_fx_traces_a_layer_with_its_own_forward() -> None:
    base, model = pair(lambda: nn.Sequential(Own(6, 6), nn.Linear(6, 4)), ["0", "1"])
    traced = fx.symbolic_trace(model)
    for graph in (traced, copy.deepcopy(traced)):
        assert_same(graph(X), run_dense(base, model, X))


@pytest.mark.parametrize("first", ["reflected", "saved"])
def test_an_attention_is_not_reflected_by_one_adapter_and_saved_by_another(first: str) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "other": nn.Linear(6, 2)})
    reflected = hra_fx.HRAConfig(r=2, target_modules=["attention"])
    saved = hra_fx.HRAConfig(r=2, target_modules=["other"], modules_to_save=["attention"])
    hra_fx.transform(model, reflected if first == "reflected" else saved, "one")
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"^attention"):
        hra_fx.add_adapter(model, "two", saved if first == "reflected" else reflected)
        hra_fx.set_adapter(model, "two")
    assert list(model["attention"].state_dict()) and model["attention"].in_proj_weight.shape == (18, 6)


def test_the_bias_of_an_attention_is_trained_too() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "other": nn.Linear(6, 2)})
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["attention"], bias="hra_only"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["attention.in_proj_bias", "attention.hra_u.default"]


class Fused(nn.Module):
    """Calls its layers, or reads their weights, by a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.fused = nn.Linear(6, 4), nn.Linear(6, 4), False

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.left, self.right]
        if self.fused:
            weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
            return F.linear(x, weight, bias)
        return torch.cat([layer(x) for layer in layers], dim=-1)


def test_a_model_that_reads_weights_after_a_setting_changed() -> None:
    base, model = pair(Fused, ["left", "right"])
    for model.fused in (False, True, False):
        assert_same(model(X), run_dense(base, model, X))


class Outputs(nn.Module):
    """An output that depends on no reflection, before one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids)
        return hidden, self.head(hidden)


class AsksForGradients(Outputs):
    """As wav2vec2 does of what it makes of its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = x * 2
        if self.training:
            hidden.requires_grad = True
        return hidden, self.head(hidden)


def still() -> nn.Module:
    """The mean before the last norm is zero but for rounding."""
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norms[0], nn.Conv2d(4, 4, 1, bias=False), norms[1])


@pytest.mark.parametrize(
    ("model", "targets", "inputs"),
    [
        (Outputs(), ["head"], torch.tensor([[1, 2, 3]])),
        (AsksForGradients(), ["head"], torch.randn(2, 6)),
        (still(), ["0", "2"], torch.randn(2, 3, 6, 6)),
    ],
)
def test_verify_raises_no_false_alarm(model: nn.Module, targets: list[str], inputs: Tensor) -> None:
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=targets), example_inputs=inputs, verify=True)
    assert len(hra_fx.report(model)) == len(targets)
