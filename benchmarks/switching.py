"""Time of `set_adapter`, here and in PEFT, for a model with 100 adapted layers and two adapters.

    python benchmarks/switching.py

Needs peft. Prints the median of many switches, per 100 layers.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx

BLOCKS, ROUNDS = 50, 200
TARGETS = ["q_proj", "v_proj"]


def median_ms(switch: Callable[[str], object]) -> float:
    times = []
    for turn in range(ROUNDS):
        begin = time.perf_counter()
        switch("ab"[turn % 2])
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main() -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2
        )
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.HRAConfig(r=8, target_modules=TARGETS), "a")
    theirs.add_adapter("b", peft.HRAConfig(r=4, target_modules=TARGETS))
    ours = hra_fx.HRAModel(base, hra_fx.HRAConfig(r=8, target_modules=TARGETS), "a")
    ours.add_adapter("b", hra_fx.HRAConfig(r=4, target_modules=TARGETS))

    layers = len({row.path for row in hra_fx.report(ours)})
    modules = sum(1 for _ in base.modules())
    here, there = (100 / layers * median_ms(model.set_adapter) for model in (ours, theirs))
    print(f"{layers} adapted layers, {modules} modules, torch {torch.__version__}, peft {peft.__version__}")
    print(f"set_adapter, per 100 layers: hra_fx {here:.2f} ms, PEFT {there:.2f} ms, ratio {there / here:.1f}")


if __name__ == "__main__":
    main()
