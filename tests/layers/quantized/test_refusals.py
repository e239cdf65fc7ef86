"""What is refused of quantized layers, in what words, and that the model is as it was."""

from __future__ import annotations

import warnings

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from layers.quantized.bases import config, inputs, int4, opaque, plain, quantized, torchao
from refusals import refused
from torch import Tensor, nn
from torchao.quantization import Int8StaticActivationInt8WeightConfig, Int8WeightOnlyConfig

import hra_fx
from hra_fx.errors import FoldError, HRAWarning, SelectionError, UnsupportedLayerError


def only(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    "layer",
    [bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False), bitsandbytes.nn.Linear4bit(64, 32)],
    ids=["8 bit", "4 bit"],
)
def test_before_it_is_quantized(layer: nn.Module) -> None:
    message = refused(only(layer), config("0"))
    assert message == (
        f"0 ({type(layer).__name__}): bitsandbytes quantizes its weight when it is first moved to a device. Call "
        "model.to(device) first."
    )


def test_weights_that_are_quantized_in_each_forward() -> None:
    message = refused(only(bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu")), config("0"))
    assert "floating-point weight (has_fp16_weights=True)" in message
    assert "Create it with has_fp16_weights=False, or leave it out" in message


class OwnForward(bitsandbytes.nn.Linear4bit):
    def forward(self, x: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self.weight.quant_state)


class OwnPlainForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (OwnForward(64, 32).to("cpu"), "bitsandbytes, 4 bit fp4"),
        (torchao(Int8WeightOnlyConfig())(nn.Sequential(OwnPlainForward(64, 32)))[0], "torchao, Int8Tensor"),
    ],
    ids=["bitsandbytes", "torchao"],
)
def test_a_forward_of_its_own(layer: nn.Module, words: str) -> None:
    message = refused(only(layer), config("0"))
    assert f"needs the rotated weight, and a quantized weight ({words}) cannot be rotated. Exclude the layer" in message


def test_a_trained_copy() -> None:
    message = refused(quantized("ao int8"), config("0", modules_to_save=["2"]))
    assert message.startswith("2 (Linear") and "cannot be copied for training" in message


def test_verifying() -> None:
    model = quantized("ao int8")
    message = r"^0: it is quantized \(torchao, Int8Tensor\), so verify=True .*verify the model before quantization"
    with pytest.raises(UnsupportedLayerError, match=message):
        hra_fx.transform(model, config(), example_inputs=inputs(), verify=True)
    assert type(model[0]) is nn.Linear


def test_a_convolution() -> None:
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(quantized("ao int8")[0].weight.data, requires_grad=False)
    assert "its weight must be a plain floating-point tensor, got Int8Tensor" in refused(only(conv), config("0"))


def test_layers_of_torch_ao() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they are to go
        model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})
    message = refused(model, config(), SelectionError)
    assert message.startswith(
        "0: `target_modules` matches this Linear of torch.ao, a quantized layer that hides its weight"
    )
    assert "Adapt, train and fold the model before you quantize it" in message
    assert "Int8DynamicActivationInt8WeightConfig" in message


@pytest.mark.parametrize("scheme", ["ao int8 dynamic", "ao int4 dynamic"])
def test_layers_beside_that_stop_gradients_are_told(scheme: str) -> None:
    with pytest.warns(HRAWarning) as caught:
        hra_fx.transform(quantized(scheme), config("0"))
    (text,) = (str(one.message) for one in caught)
    assert text.startswith("2: its input is quantized, and torchao does not pass gradients through that. ")
    assert "Add such layers to `target_modules`" in text
    hra_fx.transform(quantized(scheme), config("0", inference_mode=True))


def test_layers_that_stop_gradients_after_an_evaluation_are_told() -> None:
    model = quantized("bnb nf4")
    model[2].support_avx512bf16_for_cpu = True
    model[0].support_avx512bf16_for_cpu = False
    with pytest.warns(HRAWarning, match="^2: on this CPU, bitsandbytes does not pass gradients after a call"):
        hra_fx.transform(model, config("0"))


def test_scales_of_inputs_are_not_those_of_another_weight() -> None:
    base = torchao(
        Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.full((1, 1), 0.05), act_quant_zero_point=None)
    )(nn.Sequential(nn.Linear(64, 32)))
    model = hra_fx.transform(base, config("0"))
    with pytest.raises(FoldError, match="its Int8Tensor has input scales that were calibrated for the current weight"):
        hra_fx.fold(model, requantize=True)


# ---- what a CPU cannot run, to where it stops ----


def test_int4_of_gpus_is_adapted_and_not_folded() -> None:
    model = hra_fx.transform(int4(), config("0"))
    assert model[0].hra_u["default"].shape == (64, 4) and model[0].hra_u["default"].dtype == torch.float32
    with pytest.raises(FoldError, match=r"torchao, Int4Tensor\), and its Int4Tensor does not record how it was quant"):
        hra_fx.fold(model)


def test_a_weight_that_cannot_be_dequantized_is_read_through_the_layer() -> None:
    base, packed = opaque()
    model = hra_fx.transform(base, config("0"))
    x = inputs().requires_grad_()
    q = torch.eye(64)  # as it starts
    model(x).sum().backward()
    assert torch.allclose(x.grad, (torch.ones(5, 32) @ packed.float()) @ q, atol=1e-4)
    assert model[0].hra_u["default"].grad.norm() > 0
