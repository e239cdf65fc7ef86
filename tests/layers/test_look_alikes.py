"""Subclasses of Linear and Conv2d with their own forward, unusual models, and the classes of adapted modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import config
from layers.checking import assert_same, check, check_fold, dense_weights, normal, pair, run_dense
from named_models import tiny_llama
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear

import hra_fx

# ---- layers with their own forward ----


class Around(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(torch.tanh(input))


class Twice(nn.Linear):
    """Two arguments, and the weight read twice."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return input @ self.weight.t() + torch.tanh(other @ self.weight.t() + self.bias)


class Feeding(nn.Module):
    """Calls a layer with one or two arguments. It can be traced."""

    def __init__(self, layer: nn.Module, count: int = 1) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.layer = layer
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.tanh(self.layer(x) if self.count == 1 else self.layer(x, 2 * x))


class Demodulated(nn.Conv2d):
    """Does not only multiply with the rows of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        norm = self.weight.flatten(1).pow(2).sum(1).add(1).rsqrt().view(-1, 1, 1, 1)
        cross = self.weight.sum((0, 1), keepdim=True).tanh()
        return F.conv2d(input, self.weight * norm + cross, self.bias, self.stride, self.padding)


LINEARS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "FalconLinear": (lambda: FalconLinear(6, 4), 1),
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), 1),
    "around": (lambda: Around(6, 4, bias=False), 1),
    "two arguments": (lambda: Twice(6, 4), 2),
}


@pytest.mark.parametrize(("layer", "count"), LINEARS.values(), ids=LINEARS)
def test_subclasses_of_linear(layer: Callable[[], nn.Module], count: int) -> None:
    base, model = pair(lambda: Feeding(layer(), count), ["layer", "before"], apply_GS=True)
    check(base, model, normal(1, 3, 6))
    check_fold(base, model, normal(1, 3, 6))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "StdConv2d of a group": lambda: StdConv2d(4, 6, 3, padding=1, groups=2),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(4, 6, 3),
    "Conv2dSame": lambda: Conv2dSame(4, 6, 3, stride=2),
    "Conv2dSame, dilated": lambda: Conv2dSame(4, 6, (3, 2), dilation=2, bias=False),
    "demodulated": lambda: Demodulated(4, 6, 3, padding=1),
}


@pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)
def test_subclasses_of_conv2d(layer: Callable[[], nn.Module]) -> None:
    base, model = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), layer(), nn.ReLU()), ["0", "1"], r=2)
    check(base, model, normal(2, 2, 3, 8, 8), rtol=1e-9)
    check_fold(base, model, normal(2, 2, 3, 8, 8), rtol=1e-9)


# ---- other unusual models and layers ----

X = normal(1, 5, 6)


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


# ---- new objects of adapted classes are plain ----


def test_a_slice_of_an_adapted_sequential_runs_its_adapted_layers() -> None:
    base, model = pair(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), ["0", "2"])
    whole = model(X)
    hidden = torch.relu(F.linear(X, dense_weights(base, model)["0.weight"], base[0].bias))
    first, last = model[:2], model[2:]
    assert (len(first), len(last)) == (2, 1)
    assert_same(first(X), hidden)
    assert_same(last(first(X)), whole)
    # The slice shares the layers, and the model is unchanged.
    assert first[0] is model[0]
    assert torch.equal(model(X), whole)


@pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
def test_the_class_of_a_model_of_transformers_loads_base_models(way: Callable[..., Any], tmp_path: Path) -> None:
    plain = tiny_llama()
    plain.save_pretrained(tmp_path)
    model = way(copy.deepcopy(plain), config("q_proj"))
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert type(loaded) is type(plain)
        assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))
