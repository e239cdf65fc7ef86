"""The example of PEFT's page of `HRAModel`, with the import changed: the contract of this project. Do not remove it."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers

from hra_fx import HRAConfig, HRAModel

TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def text_encoder() -> Any:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


CASES = [
    (text_encoder, TEXT, {"input_ids": torch.arange(6)[None]}),
    (unet, UNET, {"sample": torch.ones(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.ones(1, 2, 16)}),
]


@pytest.mark.parametrize(("make", "targets", "inputs"), CASES, ids=["text encoder", "unet"])
def test_stable_diffusion(make: Any, targets: list[str], inputs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    reference = peft.HRAModel(copy.deepcopy(model), peft.HRAConfig(r=8, target_modules=targets), "default")
    kind, plain = type(model), model
    config = HRAConfig(r=8, target_modules=targets, init_weights=False, pairs=False)
    model = HRAModel(model, config, "default")
    assert model is plain and isinstance(model, HRAModel) and isinstance(model, kind)
    assert model.prefix == "hra_" and model.base_model.prefix == "hra_"
    assert any(isinstance(part, model.tuner_layer_cls) for part in model.modules())
    theirs = {name: value for name, value in reference.named_parameters() if "hra_u" in name}
    for (name, ours), value in zip(
        [(n, p) for n, p in model.named_parameters() if "hra_u" in n], theirs.values(), strict=True
    ):
        assert ours.shape == value.shape, name
        value.data.copy_(ours.data)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], reference.model(**inputs)[0])
