"""Layers that are almost a Linear or a Conv2d: own forwards, GPT-2's Conv1D, and convolutions of every dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from adapting import config
from layers.checking import check, check_fold, normal, pair
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.variants import ConvAdapters, LinearAdapters

# ---- forwards of their own ----


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 2 * self.weight, self.bias)


class Around(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(torch.tanh(input))


class Twice(nn.Linear):
    """Two arguments, and the weight read twice."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return input @ self.weight.t() + torch.tanh(other @ self.weight.t() + self.bias)


class Feeding(nn.Module):
    """Calls the layer with as many values as it takes, on a path that can be traced."""

    def __init__(self, layer: nn.Module, count: int = 1) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.layer = layer
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.tanh(self.layer(x) if self.count == 1 else self.layer(x, 2 * x))


class ScaledConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Demodulated(nn.Conv2d):
    """Uses the weight in another way than its rows."""

    def forward(self, input: Tensor) -> Tensor:
        norm = self.weight.flatten(1).pow(2).sum(1).add(1).rsqrt().view(-1, 1, 1, 1)
        cross = self.weight.sum((0, 1), keepdim=True).tanh()
        return F.conv2d(input, self.weight * norm + cross, self.bias, self.stride, self.padding)


LINEARS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "FalconLinear": (lambda: FalconLinear(6, 4), 1),
    "NonDynamicallyQuantizableLinear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(6, 4), 1),
    "scaled": (lambda: Scaled(6, 4), 1),
    "around": (lambda: Around(6, 4, bias=False), 1),
    "two arguments": (lambda: Twice(6, 4), 2),
}


@pytest.mark.parametrize(("layer", "count"), LINEARS.values(), ids=LINEARS)
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3, "apply_GS": True}], ids=["even", "GS"])
def test_subclasses_of_linear(layer: Callable[[], nn.Module], count: int, fields: dict[str, Any]) -> None:
    base, model = pair(lambda: Feeding(layer(), count), ["layer", "before"], **fields)
    plain = type(base.layer).__name__.startswith("NonDynamically")
    assert type(model.layer.hra_u) is (LinearAdapters if plain else HouseholderAdapters)
    assert model.layer.hra_u.reflects_input is plain
    assert type(model.before.hra_u) is LinearAdapters
    check(base, model, normal(1, 3, 6))
    check_fold(base, model, normal(1, 3, 6))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "StdConv2d": lambda: StdConv2d(4, 6, 3, padding=1),
    "StdConv2d of a group": lambda: StdConv2d(4, 6, 3, padding=1, groups=2),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(4, 6, 3),
    "Conv2dSame": lambda: Conv2dSame(4, 6, 3, stride=2),
    "Conv2dSame, dilated": lambda: Conv2dSame(4, 6, (3, 2), dilation=2, bias=False),
    "scaled": lambda: ScaledConv(4, 6, 3),
    "demodulated": lambda: Demodulated(4, 6, 3, padding=1),
}


@pytest.mark.parametrize("layer", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 2, "apply_GS": True}], ids=["even", "GS"])
def test_subclasses_of_conv2d(layer: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), layer(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    def settled() -> nn.Module:
        model = make()
        model(torch.zeros(1, 3, 8, 8))
        return model

    base, model = pair(settled, ["0", "1"], **fields)
    assert type(model[1].hra_u) is HouseholderAdapters
    check(base, model, normal(2, 2, 3, 8, 8), rtol=1e-9)
    check_fold(base, model, normal(2, 2, 3, 8, 8), rtol=1e-9)


# ---- transformers' Conv1D ----


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3}, {"r": 3, "apply_GS": True}], ids=["even", "odd", "GS"])
def test_conv1d_of_transformers(fields: dict[str, Any]) -> None:
    base, model = pair(lambda: nn.Sequential(Conv1D(4, 6), nn.Tanh(), nn.Linear(4, 2)), ["0", "2"], **fields)
    assert model[0].hra_u.default.shape == (6, fields["r"])
    check(base, model, normal(4, 2, 3, 6))
    folded = check_fold(base, model, normal(4, 2, 3, 6))
    assert folded[0].weight.shape == (6, 4)


def gpt2(**kwargs: Any) -> nn.Module:
    sizes = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 32}
    settings = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=16, pad_token_id=16, **kwargs)
    return transformers.GPT2LMHeadModel(settings)


IDS = torch.randint(0, 16, (2, 7), generator=torch.Generator().manual_seed(0))


def test_gpt2_whole() -> None:
    base, model = pair(gpt2, ["c_attn", "c_proj", "c_fc"])
    assert len(hra_fx.report(model)) == 8
    check(base, model, input_ids=IDS, labels=IDS, use_cache=False)
    with torch.no_grad():
        written = model.generate(IDS, max_new_tokens=6, do_sample=False)
    folded = check_fold(base, model, input_ids=IDS, use_cache=False)
    assert torch.equal(folded.generate(IDS, max_new_tokens=6, do_sample=False), written)
    base.load_state_dict(folded.state_dict())
    assert torch.equal(base.generate(IDS, max_new_tokens=6, do_sample=False), written)


# ---- convolutions of one, two and three axes ----

GEOMETRY: dict[str, dict[str, Any]] = {
    "pointwise": {"kernel_size": 1},
    "plain": {"kernel_size": 3},
    "no bias": {"kernel_size": 2, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride over the kernel": {"kernel_size": 1, "stride": 2},
    "padding": {"kernel_size": 3, "padding": 2},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "same"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular, same, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "circular"},
    "everything": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 1, "groups": 2, "padding_mode": "circular"},
}
AXES: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Convolved(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("geometry", "axes", "batched"),
    [(name, axes, (number + axes) % 2 == 0) for number, name in enumerate(GEOMETRY) for axes in AXES],
)
def test_convolutions(axes: int, geometry: str, batched: bool) -> None:
    base, model = pair(lambda: Convolved(AXES[axes](4, 8, **GEOMETRY[geometry])), ["conv"])
    assert isinstance(model.conv.hra_u, ConvAdapters)
    x = normal(5, *(2,) * batched, 4, *((9, 6, 7)[-axes:]))
    check(base, model, x)
    check_fold(base, model, x)


def test_oblong_kernels_of_three_axes() -> None:
    settings = {"kernel_size": (1, 3, 2), "stride": (1, 2, 1), "padding": (0, 2, 1), "dilation": (2, 1, 2), "groups": 2}
    base, model = pair(lambda: Convolved(nn.Conv3d(4, 6, **settings)), ["conv"], apply_GS=True)
    assert model.conv.hra_u.default.shape == (2 * 6, 3)
    check(base, model, normal(6, 2, 4, 5, 8, 9))
    check_fold(base, model, normal(6, 2, 4, 5, 8, 9))


@pytest.mark.parametrize("axes", AXES)
def test_reports_say_what_they_are(axes: int) -> None:
    model = hra_fx.transform(nn.Sequential(AXES[axes](4, 6, 3, groups=2)), config("0"))
    (row,) = hra_fx.report(model).rows
    size = "x".join("3" * axes)
    assert row.layer_type == f"Conv{axes}d 4->6 {size}, groups 2"


def test_transposed_convolutions_are_named_as_what_cannot_be() -> None:
    with pytest.raises(hra_fx.SelectionError, match="0: `target_modules` matches this ConvTranspose1d, but only"):
        hra_fx.transform(nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(2, 2)), config("0", "1"))


def test_a_mixture_of_experts_in_one_convolution_is_none() -> None:
    """timm's CondConv2d holds one vector of all weights for each expert: no layer by class."""
    layer = CondConv2d(4, 6, 3)
    assert not isinstance(layer, nn.Conv2d)
    with pytest.raises(hra_fx.SelectionError, match="matches this CondConv2d"):
        hra_fx.transform(nn.Sequential(layer), config("0"))
