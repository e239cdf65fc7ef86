"""Some models of the zoo, one of each kind. `make zoo` checks all models, and writes docs/zoo.md."""

from __future__ import annotations

import pytest
import torchvision
from torchvision.models import detection, segmentation
from zoo.checks import check
from zoo.registry import entries, named
from zoo.result import CHECKS

ENTRIES = entries()
#: One of each kind: convolutions, windows, readers of weights, detectors; text, experts, states, audio, images.
PICKED = """
torchvision/resnet18 torchvision/mobilenet_v3_small torchvision/shufflenet_v2_x0_5 torchvision/regnet_y_400mf
torchvision/swin_t torchvision/swin_v2_t torchvision/vit_b_32 torchvision/maxvit_t torchvision/convnext_tiny
torchvision/lraspp_mobilenet_v3_large torchvision/fasterrcnn_mobilenet_v3_large_320_fpn
torchvision/ssdlite320_mobilenet_v3_large
timm/vit_tiny_patch16_224 timm/eva02_tiny_patch14_224 timm/beit_base_patch16_224 timm/test_efficientnet_evos
timm/levit_128s timm/test_nfnet timm/xcit_nano_12_p8_224
transformers/albert transformers/bert transformers/distilbert transformers/falcon transformers/gemma3
transformers/gpt2 transformers/llama transformers/mamba transformers/mixtral transformers/modernbert
transformers/phi3 transformers/qwen3_moe transformers/bart transformers/t5 transformers/switch_transformers
transformers/qwen3_moe_experts transformers/gpt_oss_experts
transformers/beit transformers/clip transformers/detr transformers/hubert transformers/llava transformers/sam
transformers/segformer transformers/swin transformers/vit_mae transformers/wav2vec2 transformers/whisper
diffusers/AutoencoderKL diffusers/ControlNetModel diffusers/FluxTransformer2DModel
diffusers/PixArtTransformer2DModel diffusers/UNet2DConditionModel
"""


#: Quick ones of each library: convolutions, attention, readers of weights (beit, swin), tied weights (gpt2).
QUICK = """
torchvision/swin_t timm/vit_tiny_patch16_224 timm/beit_base_patch16_224 timm/test_nfnet
transformers/bert transformers/gpt2 transformers/llama diffusers/AutoencoderKL
"""


@pytest.mark.parametrize(
    "name", [name if name in QUICK.split() else pytest.param(name, marks=pytest.mark.slow) for name in PICKED.split()]
)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert not result.inert
    assert list(result.checks) == list(CHECKS)
    assert result.matched


def test_the_tables_have_every_torchvision_model_and_family_of_timm() -> None:
    names = {
        name for kind in (torchvision.models, detection, segmentation) for name in torchvision.models.list_models(kind)
    }
    assert names == {entry.partition("/")[2] for entry in ENTRIES if entry.startswith("torchvision/")}
    assert sum(name.startswith("timm/") for name in ENTRIES) >= 239
    assert sum(name.startswith("transformers/") for name in ENTRIES) >= 45
    assert sum(name.startswith("diffusers/") for name in ENTRIES) >= 7


def test_entries_are_named_by_patterns_with_or_without_the_library() -> None:
    wanted = ["torchvision/swin_s", "torchvision/swin_t", "transformers/bert"]
    assert list(named(["transformers/bert", "swin_[st]"])) == wanted
    assert named([]) == ENTRIES


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(KeyError, match="resnet17: no model of the zoo is called so"):
        named(["resnet17"])
