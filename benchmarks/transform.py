"""Time of `transform` compared with `torch.fx.symbolic_trace` of the same model: all Linear and Conv2d layers, r=8.

    python benchmarks/transform.py [name ...]

Needs torchvision, timm and transformers. Prints medians of interleaved repetitions after one warm-up run; every run
has a new model. The second ratio is of CPU time, which depends least on the load of the machine (set
OMP_NUM_THREADS=1, because waiting threads count too). Models of transformers have no ratio, because fx cannot trace
them.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision
import transformers
from torch import fx, nn
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig

import hra_fx

ROUNDS = 5
RANK = 8

VISION: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: torchvision.models.get_model(name)
        for name in ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v3_small", "efficientnet_b0", "densenet121")
    },
    "convnext_tiny": lambda: torchvision.models.get_model("convnext_tiny"),
    **{
        name: lambda name=name: timm.create_model(name)
        for name in ("vit_tiny_patch16_224", "mixer_s32_224", "regnety_002")
    },
}

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "BERT, tiny": lambda: transformers.BertForSequenceClassification(BertConfig(vocab_size=64, **SMALL)),
    "Llama, tiny": lambda: transformers.LlamaForCausalLM(LlamaConfig(vocab_size=64, **SMALL)),
    "T5, tiny": lambda: transformers.T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    ),
    "ViT, tiny": lambda: transformers.ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL)),
}


class Seconds(NamedTuple):
    """Wall time and CPU time of one call, or their medians."""

    clock: float
    processor: float


def seconds(build: Callable[[], nn.Module], act: Callable[[nn.Module], object]) -> Seconds:
    """The time of one call, on a new model."""
    model = build()
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    act(model)
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def adapt(model: nn.Module) -> None:
    layers = [path for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    hra_fx.transform(model, hra_fx.HRAConfig(r=RANK, target_modules=layers))


def medians(build: Callable[[], nn.Module], *acts: Callable[[nn.Module], object]) -> list[Seconds]:
    """Medians over the rounds after the first one, which fills the caches."""
    rounds = [[seconds(build, act) for act in acts] for _ in range(ROUNDS + 1)]
    return [Seconds(*map(statistics.median, zip(*times, strict=True))) for times in zip(*rounds[1:], strict=True)]


def main() -> None:
    wanted = sys.argv[1:]
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(f"{'model':<22} {'symbolic_trace, s':>17} {'transform, s':>13} {'ratio':>6} {'of CPU':>6}")
    for name, build in VISION.items():
        if not wanted or name in wanted:
            there, here = medians(build, fx.symbolic_trace, adapt)
            ratios = " ".join(f"{ours / theirs:>6.2f}" for ours, theirs in zip(here, there, strict=True))
            print(f"{name:<22} {there.clock:>17.3f} {here.clock:>13.3f} {ratios}", flush=True)
    for name, build in TRANSFORMERS.items():
        if not wanted or name in wanted:
            first, (here,) = seconds(build, adapt), medians(build, adapt)
            print(f"{name:<22} {'':>17} {here.clock:>13.3f}         (first {first.clock:.3f})", flush=True)


if __name__ == "__main__":
    main()
