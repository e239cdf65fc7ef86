"""The time of a training step in pairs, relative to one of vectors: 72 layers of width 768, rank 8, 16 tokens.

    PYTHONPATH=benchmarks python benchmarks/pairs.py

Two copies of a model take turns, for torch's two implementations of AdamW. PEFT's LoRA with as many parameters is
beside them.
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
        hra_fx.transform(model, hra_fx.HRAConfig(r=RANK, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], fused=fused)
    if method == "pairs":
        hra_fx.train_pairs(optimizer, model)
    x = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    for fused in (False, True):
        times = in_turns({name: step_of(name, fused=fused) for name in ("pairs", "vectors", "lora")}, ROUNDS)
        over = {name: ratio(times["pairs"], times[name]) for name in ("vectors", "lora")}
        print(f"AdamW(fused={fused}): {over['vectors']:.3f} of vectors, {over['lora']:.3f} of PEFT's LoRA", flush=True)


if __name__ == "__main__":
    main()
