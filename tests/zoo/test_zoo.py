"""Some models of the zoo, one of each kind. `make zoo` checks all models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from torchvision.models import detection, segmentation
from zoo.checks import check
from zoo.models import entries, named
from zoo.result import CHECKS

ROOT = Path(__file__).parents[2]
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
transformers/gpt2
"""


@pytest.mark.parametrize(
    "name", [name if name in QUICK.split() else pytest.param(name, marks=pytest.mark.slow) for name in PICKED.split()]
)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert list(result.checks) == list(CHECKS)
    assert result.matched


def test_the_table_has_every_torchvision_model() -> None:
    names = {
        name for kind in (torchvision.models, detection, segmentation) for name in torchvision.models.list_models(kind)
    }
    assert names == {entry.partition("/")[2] for entry in ENTRIES if entry.startswith("torchvision/")}


def test_entries_are_named_by_patterns_with_or_without_the_library() -> None:
    wanted = ["torchvision/swin_s", "torchvision/swin_t", "transformers/bert"]
    assert list(named(["transformers/bert", "swin_[st]"])) == wanted


@pytest.mark.slow
def test_the_runner_keeps_results_and_exits_with_zero(tmp_path: Path) -> None:
    options = ["--only", "test_vit", "squeezenet1_1", "--jobs", "1", "--results", str(tmp_path / "results.jsonl")]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/support", "benchmarks"))

    def run() -> str:
        command = [sys.executable, "-m", "zoo.run", *options, "--resume"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "ok    torchvision/squeezenet1_1: 26 layers, torch.fx\n" in run()
    assert "[1/" not in run()
