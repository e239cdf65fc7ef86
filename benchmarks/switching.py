"""Time of `set_adapter`, here and in PEFT, for a Llama with 224 adapted layers and two adapters.

    make bench-switch

Needs peft. The calls take turns, so that other programs on the machine slow all of them equally.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from turns import in_turns, ratio

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


def alternating(switch: Callable[[str], object]) -> Callable[[], object]:
    """A call that sets one adapter, then the other."""
    names = itertools.cycle(RANKS)
    return lambda: switch(next(names))


def main() -> None:
    model = hra_fx.HRAModel(base_model(), hra_fx.HRAConfig(r=RANKS["first"], target_modules=TARGETS), "first")
    model.add_adapter("second", hra_fx.HRAConfig(r=RANKS["second"], target_modules=TARGETS))
    plain = copy.deepcopy(model)
    switches: dict[str, Callable[[str], object]] = {
        PEFT: with_peft(),
        "HRAModel.set_adapter": model.set_adapter,
        "hra_fx.set_adapter": lambda name: hra_fx.set_adapter(plain, name),
    }
    times = in_turns({name: alternating(switch) for name, switch in switches.items()}, ROUNDS)

    layers = len({row.path for row in hra_fx.report(model)})
    modules = sum(1 for _ in base_model().modules())
    print(f"{layers} adapted layers, {modules} modules, torch {torch.__version__}, peft {peft.__version__}")
    for name, own in times.items():
        print(f"{name:<21}  {1e3 * statistics.median(own):5.2f} ms, {ratio(own, times[PEFT]):4.2f} of PEFT's time")


if __name__ == "__main__":
    main()
