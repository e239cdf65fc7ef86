"""Quantized layers that are refused: the messages, and that the model is unchanged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from layers.quantized.bases import SCHEMES, Packed, adapted, config, inputs, int4, opaque, plain, quantized, torchao
from refusals import refused
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig

import hra_fx
from hra_fx.errors import FoldError, HRAWarning, SelectionError, UnsupportedLayerError


def only(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


class OwnForward(bitsandbytes.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.weight.quant_state)


class OwnPlainForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


# ---- layers of other libraries, which are called to check that they are linear ----


class Squashed(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Wide(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None])


def wrapper() -> nn.Module:
    """A module around a layer, as other adapters add it. Its layer should be adapted instead."""
    around = nn.Sequential(nn.Linear(8, 4))
    around.in_features, around.out_features = 8, 4
    return around


def convolution() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(quantized("ao int8")[0].weight.data, requires_grad=False)
    return conv


EIGHT, FOUR = bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit
FIRST_MOVE = r"0 \({}\): bitsandbytes quantizes its weight when it is first moved to a device\. Call model"
OWN = r".*needs the rotated weight, and a quantized weight \({}\) cannot be rotated\. Exclude the layer"
#: A layer, and a regex for the message.
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "8 bit, not quantized yet": (lambda: EIGHT(64, 32, has_fp16_weights=False), FIRST_MOVE.format("Linear8bitLt")),
    "4 bit, not quantized yet": (lambda: FOUR(64, 32), FIRST_MOVE.format("Linear4bit")),
    "quantized in each forward": (
        lambda: EIGHT(64, 32, has_fp16_weights=True).to("cpu"),
        r".*created with has_fp16_weights=True\. Set that to False, or leave it out",
    ),
    "own forward of bitsandbytes": (lambda: OwnForward(64, 32).to("cpu"), OWN.format("bitsandbytes, 4 bit fp4")),
    "own forward of torchao": (
        lambda: torchao(Int8WeightOnlyConfig())(only(OwnPlainForward(64, 32)))[0],
        OWN.format("torchao, Int8Tensor"),
    ),
    "not linear": (
        lambda: Squashed(nn.Linear(64, 32)),
        r"0 \(Squashed\): its output is not linear in its input, so it has no weight to rotate\. Leave it out",
    ),
    "no rows": (
        lambda: Wide(nn.Linear(64, 32)),
        r"0 \(Wide\): calling it with \(4, 64\) failed \((addmm: )?mat1 and mat2 shapes",
    ),
    "no data": (
        lambda: Packed(nn.Linear(64, 32)).to("meta"),
        r"0 \(Packed\): its tensors have no data, so nothing says whether it is linear\. Load the weights first\.",
    ),
    "a convolution": (convolution, r".*its weight must be a plain floating-point tensor, got Int8Tensor"),
    "a module around a layer": (wrapper, r".*To adapt the layers inside it, use target_modules=\['0\.0'\]"),
    "HQQ, not quantized yet": (
        lambda: HQQLinear(nn.Linear(64, 32), BaseQuantizeConfig(), device="cpu", initialize=False),
        ".*matches this HQQLinear",
    ),
}


@pytest.mark.parametrize("scheme", ["bnb int8", "unknown"])
def test_an_offloaded_layer(scheme: str) -> None:
    model = quantized(scheme)
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert re.match(r"0 \(.*\): accelerate offloads its quantized weight\. Load", refused(model, config("0")))


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    kind = SelectionError if name in ("a module around a layer", "HQQ, not quantized yet") else UnsupportedLayerError
    assert re.match(message, refused(only(make()), config("0"), kind), re.DOTALL)


def test_all_linear_selects_layers_of_known_libraries_only() -> None:
    model = nn.Sequential(quantized("hqq 4 bit")[0], Packed(nn.Linear(128, 64)), nn.Linear(64, 8))
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules="all-linear"))
    assert [row.path for row in hra_fx.report(model)] == ["0", "2"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fold_and_merge(scheme: str) -> None:
    model, x = adapted(scheme), inputs()
    wanted = model(x)
    words = re.escape(SCHEMES[scheme].words)
    text = rf"^0: its weight is quantized \({words}\), .*without quantization .*save_as_lora\.$"
    for act in (hra_fx.fold, hra_fx.merge_adapter):
        with pytest.raises(FoldError, match=text):
            act(model)
    assert torch.equal(model(x), wanted)


def test_quantized_layers_without_an_adapter_do_not_matter() -> None:
    model = nn.ModuleDict({"packed": quantized("bnb nf4"), "head": nn.Linear(32, 8)})
    hra_fx.transform(model, config("head", inference_mode=True))
    hra_fx.fold(model)
    assert type(model["head"]) is nn.Linear


def test_a_trained_copy() -> None:
    message = refused(quantized("ao int8"), config("0", modules_to_save=["2"]))
    assert message.startswith("2 (Linear") and "cannot be copied for training" in message


def test_layers_of_torch_ao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's quantization is deprecated
        model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})
    message = refused(model, config(), SelectionError)
    assert message.startswith(
        "0: `target_modules` matches this Linear of torch.ao, a quantized layer that hides its weight"
    )
    assert "Adapt, train and fold the model before you quantize it" in message
    assert "Int8DynamicActivationInt8WeightConfig" in message


@pytest.mark.parametrize("scheme", ["ao int8 dynamic", "ao int4 dynamic"])
def test_other_layers_that_stop_gradients_are_warned_about(scheme: str) -> None:
    with pytest.warns(HRAWarning) as caught:
        hra_fx.transform(quantized(scheme), config("0"))
    (text,) = (str(one.message) for one in caught)
    assert text.startswith("2: its input is quantized, and torchao does not pass gradients through that. ")
    assert "Add such layers to `target_modules`" in text
    hra_fx.transform(quantized(scheme), config("0", inference_mode=True))


def test_other_layers_that_stop_gradients_after_an_evaluation_are_warned_about() -> None:
    model = quantized("bnb nf4")
    model[2].support_avx512bf16_for_cpu = True
    model[0].support_avx512bf16_for_cpu = False
    with pytest.warns(HRAWarning, match="^2: on this CPU, bitsandbytes does not pass gradients after a call"):
        hra_fx.transform(model, config("0"))


# ---- what a CPU cannot run, as far as it runs ----


def test_int4_of_gpus_is_adapted_and_not_folded() -> None:
    model = hra_fx.transform(int4(), config("0"))
    assert model[0].hra_u["default"].shape == (64, 2, 2) and model[0].hra_u["default"].dtype == torch.float32
    with pytest.raises(FoldError, match=r"torchao, Int4Tensor\), and cannot be folded"):
        hra_fx.fold(model)


def test_a_weight_that_cannot_be_dequantized_is_read_through_the_layer() -> None:
    base, packed = opaque()
    model = hra_fx.transform(base, config("0"))
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(5, 32) @ packed.float(), atol=1e-4)  # Q = I at the start
    assert model[0].hra_u["default"].grad.norm() > 0
