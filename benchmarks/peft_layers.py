"""PEFT's HRA with and without `accelerate_peft`, hra_fx, and PEFT's LoRA: a training step and a forward, in one run.

    make bench-peft

Needs peft. A Llama of two blocks, all of whose projections are adapted, float32. The methods take turns, and ratios are
medians over the rounds. Prints whether each limit is met.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from turns import in_turns, ratio

import hra_fx

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R, VOCABULARY, BLOCKS = 8, 1000, 2
PEFT, FAST, OURS, LORA = "PEFT HRA", "PEFT HRA, accelerated", "hra_fx", "PEFT LoRA"


class Setting(NamedTuple):
    """A size of the model.

    Attributes:
        d: width.
        tokens: in the batch.
        limit: of the accelerated training step, as a share of PEFT HRA's.
        rounds: of the measurement.
    """

    d: int
    tokens: int
    limit: float
    rounds: int


SETTINGS = (Setting(512, 27, 0.5, 30), Setting(2048, 64, 0.1, 3))


def base_model(d: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_attention_heads": d // 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=BLOCKS, **sizes))


def adapted(base: Any) -> dict[str, Any]:
    """A copy of the model for each method."""
    hra = peft.HRAConfig(r=R, target_modules=TARGETS)
    models: dict[str, Any] = {
        PEFT: peft.get_peft_model(copy.deepcopy(base), hra),
        FAST: peft.get_peft_model(copy.deepcopy(base), hra),
        OURS: hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=R, target_modules=TARGETS)),
        LORA: peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=R, target_modules=TARGETS)),
    }
    hra_fx.accelerate_peft(models[FAST])
    return models


def training_step(model: Any, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def inference(model: Any, tokens: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model(input_ids=tokens)

    return forward


def measure(setting: Setting, make: Callable[[Any, Tensor], Callable[[], None]], rounds: int) -> float:
    """Print the times of one setting; the accelerated time as a share of PEFT HRA's."""
    tokens = torch.randint(VOCABULARY, (1, setting.tokens))
    calls = {name: make(model, tokens) for name, model in adapted(base_model(setting.d)).items()}
    times = in_turns(calls, rounds)
    for name, own in times.items():
        columns = "  ".join(f"{ratio(own, times[of]):5.2f} of {of}" for of in (PEFT, LORA))
        print(f"  {name:<22} {1e3 * statistics.median(own):8.1f} ms  {columns}")
    return ratio(times[FAST], times[PEFT])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="instead of those of each setting")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, r={R}, float32")
    for setting in SETTINGS:
        rounds = options.rounds or setting.rounds
        print(f"d={setting.d}, {setting.tokens} tokens, training step")
        share = measure(setting, training_step, rounds)
        print(f"  limit {setting.limit}: {'met' if share <= setting.limit else 'NOT met'}")
        print(f"d={setting.d}, {setting.tokens} tokens, inference")
        measure(setting, inference, rounds)


if __name__ == "__main__":
    main()
