"""The time of a training step in pairs, relative to one of vectors: 72 layers of width 768, rank 8, 16 tokens.

    PYTHONPATH=benchmarks python benchmarks/pairs.py        # or: make bench-pairs

Copies of a model take turns, for torch's two implementations of AdamW. Beside them are the alternative to converting
the vectors in each step of the optimizer, parameters `m` and `d` from which each forward computes the vectors, and
PEFT's LoRA with as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn
from torch.func import functional_call
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
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if method == "parameters":
        trained = {name: nn.Parameter(torch.randn(2, WIDTH, RANK // 2)) for name in trained}
    optimizer = torch.optim.AdamW(trained.values(), fused=fused)
    if method == "pairs":
        hra_fx.train_pairs(optimizer, model)
    x = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        values = {name: vectors(*one) for name, one in trained.items()} if method == "parameters" else {}
        functional_call(model, values, (x,)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def vectors(m: Tensor, d: Tensor) -> Tensor:
    """The vectors `(WIDTH, RANK)` of parameters `(WIDTH, RANK / 2)`."""
    return torch.stack([m + 0.1 * d, m - 0.1 * d], dim=-1).flatten(-2)


def main(rounds: int = ROUNDS) -> None:
    for fused in (False, True):
        names = ("pairs", "vectors", "parameters", "lora")
        times = in_turns({name: step_of(name, fused=fused) for name in names}, rounds)
        pairs, parameters, lora = (ratio(times[name], times["vectors"]) for name in ("pairs", "parameters", "lora"))
        print(
            f"AdamW(fused={fused}), relative to vectors: pairs {pairs:.3f}, m and d as parameters {parameters:.3f}, "
            f"PEFT's LoRA {lora:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
