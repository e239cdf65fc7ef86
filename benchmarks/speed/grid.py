"""The settings to measure, and the time for each: all of them, some, or tiny ones.

Budgets are seconds on two cores, chosen so that `make bench` takes about half an hour and `make bench-quick` about
five minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from speed.methods import COMPILERS, INFERENCE, TRAINING
from speed.setting import Mode, Setting
from speed.timing import Budget

LLAMA = "llama-768x3"
DTYPES = ("float32", "bfloat16")
RANKS = (8, 32)
#: Tokens, and seconds for the rounds of each setting.
TOKENS = {1: 6, 16: 10, 512: 30, 2048: 40}
STEPS: tuple[Mode, ...] = ("training", "inference")


@dataclass(frozen=True)
class Job:
    """A setting, its methods, and its time budget."""

    setting: Setting
    methods: Sequence[str]
    budget: Budget


def methods_of(mode: Mode) -> Sequence[str]:
    """The methods of a mode: a folded model is not trained."""
    return INFERENCE if mode == "inference" else TRAINING


def full() -> Iterator[Job]:
    """All settings."""
    for mode in STEPS:
        for dtype in DTYPES:
            for r in RANKS:
                for tokens, seconds in TOKENS.items():
                    budget = Budget(seconds, least=5 if tokens <= 512 else 3)
                    yield Job(Setting(LLAMA, mode, tokens, dtype, r), methods_of(mode), budget)
        # A step of PEFT's HRA takes almost a minute in ResNet-50.
        others = [method for method in methods_of(mode) if method != "peft-hra"]
        yield Job(Setting("resnet50", mode, 2), others, Budget(25))
        for tokens, seconds in ((16, 10), (512, 25)):
            yield Job(Setting(LLAMA, mode, tokens, compiled=True), COMPILERS, Budget(seconds))
    for dtype in DTYPES:
        for tokens in (512, 2048):
            yield Job(Setting(LLAMA, "memory", tokens, dtype), TRAINING, Budget(0, least=1))
    yield Job(Setting(LLAMA, "generate", 16), INFERENCE, Budget(20))


def quick() -> Iterator[Job]:
    """The main settings, and fewer methods."""
    pair, with_gs = ("lora", "ours"), ("lora", "ours", "ours-gs")
    for tokens, seconds in {1: 4, 16: 8, 512: 20, 2048: 30}.items():
        yield Job(Setting(LLAMA, "training", tokens), with_gs if tokens in (16, 512) else pair, Budget(seconds))
    for tokens, seconds in {512: 8, 2048: 20}.items():
        yield Job(Setting(LLAMA, "training", tokens, "bfloat16"), pair, Budget(seconds))
    for tokens, seconds in {16: 5, 512: 10}.items():
        compiled = Setting(LLAMA, "training", tokens, compiled=True)
        yield Job(compiled, ("lora-inductor", "ours-inductor"), Budget(seconds))
    folded = ("base", "base-again", *pair, "folded")
    for tokens, seconds in {1: 2, 16: 3, 512: 12, 2048: 10}.items():
        yield Job(Setting(LLAMA, "inference", tokens), folded if tokens in (16, 512) else pair, Budget(seconds))
    yield Job(Setting(LLAMA, "inference", 512, "bfloat16"), pair, Budget(4))
    yield Job(Setting(LLAMA, "generate", 16), pair, Budget(6))
    for tokens in (512, 2048):
        yield Job(Setting(LLAMA, "memory", tokens), with_gs if tokens == 512 else pair, Budget(0, least=1))
    for mode, seconds in zip(STEPS, (12, 6), strict=True):
        yield Job(Setting("resnet50", mode, 2), pair, Budget(seconds))


def few() -> Iterator[Job]:
    """Few tokens, in models whose projections are all adapted."""
    for workload, tokens, budget in (("llama-512x2", 27, Budget(10)), ("llama-2048x2", 64, Budget(60))):
        for mode in STEPS:
            yield Job(Setting(workload, mode, tokens), ("lora", "peft-hra", "ours"), budget)


def smoke() -> Iterator[Job]:
    """Every mode on a tiny model."""
    budget, tiny = Budget(0, least=2), "llama-64x1"
    yield Job(Setting(tiny, "training", 4, r=4), TRAINING, budget)
    yield Job(Setting(tiny, "inference", 4, r=4), INFERENCE, budget)
    yield Job(Setting(tiny, "generate", 2, r=4), ("base", "lora", "ours"), budget)
    yield Job(Setting(tiny, "memory", 4, r=4), ("ours",), Budget(0, least=1))
