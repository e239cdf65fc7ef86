"""The time of a training step in pairs, relative to one of vectors: 72 layers of width 768, rank 8, 16 tokens.

    PYTHONPATH=benchmarks python benchmarks/pairs.py        # or: make bench-pairs

Copies of a model take turns, for torch's two implementations of AdamW. Beside them is PEFT's LoRA with as many
parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import nn
from turns import in_turns, ratio

import hra_fx

LAYERS, WIDTH, RANK, TOKENS, ROUNDS = 72, 768, 8, 16, 60
TARGETS = [str(index) for index in range(LAYERS)]


def step_of(method: str, *, fused: bool) -> Callable[[], None]:
    """A training step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    if method == "lora":
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK // 2, target_modules=TARGETS), model)
    else:
        hra_fx.transform(model, hra_fx.HRAConfig(r=RANK, target_modules=TARGETS, pairs=method == "pairs"))
    optimizer = torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), fused=fused)
    x = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(rounds: int = ROUNDS) -> None:
    for fused in (False, True):
        times = in_turns({name: step_of(name, fused=fused) for name in ("pairs", "vectors", "lora")}, rounds)
        pairs, lora = (ratio(times[name], times["vectors"]) for name in ("pairs", "lora"))
        print(f"AdamW(fused={fused}), relative to vectors: pairs {pairs:.3f}, PEFT's LoRA {lora:.3f}", flush=True)


if __name__ == "__main__":
    main()
