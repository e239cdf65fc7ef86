"""Time of `set_adapter`, here and in PEFT, for a Llama with 224 adapted layers and two adapters.

    make bench-switch

Needs peft. The calls take turns, so that whatever else the machine does slows all of them alike.
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

BLOCKS, ROUNDS = 32, 400
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {"first": 8, "second": 4}
PEFT = "PEFT"


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2
        )
    )


def with_peft() -> Callable[[str], object]:
    model = peft.get_peft_model(base_model(), peft.HRAConfig(r=RANKS["first"], target_modules=TARGETS), "first")
    model.add_adapter("second", peft.HRAConfig(r=RANKS["second"], target_modules=TARGETS))
    switch: Callable[[str], object] = model.set_adapter
    return switch


def times_ms(switches: dict[str, Callable[[str], object]]) -> dict[str, list[float]]:
    """Times of all calls: one of each in every round."""
    times: dict[str, list[float]] = {name: [] for name in switches}
    for turn in range(ROUNDS):
        for name, switch in switches.items():
            begin = time.perf_counter()
            switch(list(RANKS)[turn % 2])
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def main() -> None:
    model = hra_fx.HRAModel(base_model(), hra_fx.HRAConfig(r=RANKS["first"], target_modules=TARGETS), "first")
    model.add_adapter("second", hra_fx.HRAConfig(r=RANKS["second"], target_modules=TARGETS))
    plain = copy.deepcopy(model)
    times = times_ms(
        {
            PEFT: with_peft(),
            "HRAModel.set_adapter": model.set_adapter,
            "hra_fx.set_adapter": lambda name: hra_fx.set_adapter(plain, name),
        }
    )

    layers = len({row.path for row in hra_fx.report(model)})
    modules = sum(1 for _ in base_model().modules())
    print(f"{layers} adapted layers, {modules} modules, torch {torch.__version__}, peft {peft.__version__}")
    for name, own in times.items():
        ratio = statistics.median(one / theirs for one, theirs in zip(own, times[PEFT], strict=True))
        print(f"{name:<21}  {statistics.median(own):5.2f} ms, {ratio:4.2f} of PEFT's time")


if __name__ == "__main__":
    main()
