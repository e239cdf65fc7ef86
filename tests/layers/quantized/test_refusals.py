"""Quantized layers that are refused or warned about: the messages, and that the model is unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from adapting import refused
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from layers.quantized.bases import SCHEMES, config, inputs, quantized, torchao
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

import hra_fx
from hra_fx.errors import SelectionError, UnsupportedLayerError

NF4 = "bitsandbytes, Linear4bit"


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


def evaluated() -> nn.Module:
    layer = quantized(NF4)[0].eval()
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        layer(inputs())
    return layer


def wrapper() -> nn.Module:
    """A module around a layer, as other adapters add it. Its layer should be adapted instead."""
    around = nn.Sequential(nn.Linear(8, 4))
    around.in_features, around.out_features = 8, 4
    return around


EIGHT, FOUR = bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit
NOT_QUANTIZED = r"0 \({}\): bitsandbytes has not quantized its weight\. Call model\.to\(device\) first"
#: A layer, and a regex for the message.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "4 bit, not quantized yet": (lambda: FOUR(64, 32), NOT_QUANTIZED.format("Linear4bit")),
    "quantized in each forward": (
        lambda: EIGHT(64, 32, has_fp16_weights=True).to("cpu"),
        NOT_QUANTIZED.format("Linear8bitLt") + ", with has_fp16_weights=False",
    ),
    "in another layout": (
        evaluated,
        r".*a call in eval mode has changed the layout of its weight\. Load the model again",
    ),
    "own forward of torchao": (
        lambda: torchao(Int8WeightOnlyConfig())(OwnForward(64, 32)),
        r".*its weight must be a plain floating-point tensor, got Int8T",
    ),
    "a module around a layer": (wrapper, r".*Use target_modules=\['0\.0'\]\."),
    "HQQ, not quantized yet": (
        lambda: HQQLinear(nn.Linear(64, 32), BaseQuantizeConfig(), device="cpu", initialize=False),
        r".*matches 0 \(HQQLinear\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    kind = SelectionError if name in ("a module around a layer", "HQQ, not quantized yet") else UnsupportedLayerError
    assert re.match(message, refused(nn.Sequential(make()), config("0"), kind), re.DOTALL)


@pytest.mark.parametrize("scheme", ["bitsandbytes, Linear8bitLt", "gptqmodel, Packed"])
def test_an_offloaded_layer(scheme: str) -> None:
    model = quantized(scheme)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert re.match(r"0 \(.*\): accelerate offloads its quantized weight\. Load", refused(model, config("0")))


def test_a_trained_copy() -> None:
    message = refused(quantized("torchao, Int8Tensor"), config("0", modules_to_save=["2"]))
    assert message.startswith("2 (Linear") and "cannot be copied for training" in message


def test_all_linear_selects_layers_of_all_libraries() -> None:
    layers = [quantized(scheme)[0] for scheme in SCHEMES]
    model = hra_fx.transform(nn.Sequential(*layers), hra_fx.HRAConfig(r=2, target_modules="all-linear"))
    assert len(hra_fx.report(model).rows) == len(SCHEMES)
