"""Some models of the zoo, one of each kind. `make zoo` checks all models, and writes build/zoo/zoo.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from torchvision.models import detection, segmentation
from zoo.checks import check
from zoo.registry import entries, named
from zoo.result import CHECKS, HIDDEN, NOT_APPLICABLE, OK, REFUSED, YES, Result
from zoo.table import markdown

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


def test_the_table_has_every_torchvision_model() -> None:
    names = {
        name for kind in (torchvision.models, detection, segmentation) for name in torchvision.models.list_models(kind)
    }
    assert names == {entry.partition("/")[2] for entry in ENTRIES if entry.startswith("torchvision/")}


def test_entries_are_named_by_patterns_with_or_without_the_library() -> None:
    wanted = ["torchvision/swin_s", "torchvision/swin_t", "transformers/bert"]
    assert list(named(["transformers/bert", "swin_[st]"])) == wanted


# ---- build/zoo/zoo.md ----

ROOT = Path(__file__).parents[2]
RIGHT = Result("timm/a", matched=4, traced=YES, checks=dict.fromkeys(CHECKS, OK) | {"size": NOT_APPLICABLE})
PARTLY = Result(
    "transformers/b",
    matched=5,
    traced=f"{REFUSED}torch.export cannot capture B: it branches on a value. Leave out trace=True: it works.",
    checks=dict.fromkeys(CHECKS, OK) | {"fold": f"{REFUSED}head: tied. Wait."},
    refused={"layers.0.x": "it is Tuesday.", "layers.1.x": "it is Tuesday."},
    first_s=0.9,
    transform_s=0.6,
    trace_s=0.2,
)
WRONG = Result("timm/c", matched=1, traced=HIDDEN, checks={"transform": OK, "eval": "off by 1 | 2"}, inert=["fc"])


def test_the_page() -> None:
    lines = markdown([RIGHT, PARTLY, WRONG], "torch 2; commit abc.").splitlines()
    assert {"torch 2; commit abc.", "| models with a wrong result | 1 |", "| layers adapted | 10 |"} < set(lines)
    assert {"| models captured by torch.export | 1 |", "| of these, with layers that only one mode calls | 1 |"} < set(
        lines
    )
    assert "| transform time / symbolic_trace time: median, largest | 3.0, 3.0 |" in lines
    assert "| timm | 2 | 1 | 1 | 1 | 5 | 0 |" in lines
    assert "| it branches on a value. | `transformers/b` |" in lines
    assert "- `timm/c`: eval: off by 1 \\| 2" in lines
    assert "| it is Tuesday. | `transformers/b layers.*.x` × 2 |" in lines
    assert "| (fold) head: tied. Wait. | `transformers/b` |" in lines
    row = next(line for line in lines if line.startswith("| `b`"))
    assert row == "| `b` | 5 | 2 | no | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ⊘ | 0.90s (3.0×) |"
    assert lines.index("## timm") < lines.index("## transformers")


@pytest.mark.slow
def test_the_runner_writes_a_table_and_exits_with_zero(tmp_path: Path) -> None:
    table = tmp_path / "zoo.md"
    options = ["--only", "test_vit", "squeezenet1_1", "--jobs", "1", "--table", str(table)]
    command = [sys.executable, "-m", "zoo.run", *options, "--results", str(tmp_path / "results.jsonl")]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/support", "benchmarks"))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    torchvision/squeezenet1_1: 26 layers, traced" in done.stdout
    assert "| models with a wrong result | 0 |" in table.read_text()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
