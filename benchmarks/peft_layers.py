"""PEFT's HRA, hra_fx, and PEFT's LoRA: a training step and a forward, in one run.

    make bench-peft

Needs peft. A Llama of two blocks, all of whose projections are adapted, float32. The methods take turns, and ratios are
medians over the rounds.
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
PEFT, OURS, LORA = "PEFT HRA", "hra_fx", "PEFT LoRA"


class Setting(NamedTuple):
    """A size of the model.

    Attributes:
        d: width.
        tokens: in the batch.
        rounds: of the measurement.
    """

    d: int
    tokens: int
    rounds: int


SETTINGS = (Setting(512, 27, 30), Setting(2048, 64, 3))
SMOKE = (Setting(64, 4, 1),)


def base_model(d: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_attention_heads": d // 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=BLOCKS, **sizes))


def adapted(base: Any) -> dict[str, Any]:
    """A copy of the model for each method."""
    hra = peft.HRAConfig(r=R, target_modules=TARGETS)
    return {
        PEFT: peft.get_peft_model(copy.deepcopy(base), hra),
        OURS: hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=R, target_modules=TARGETS)),
        LORA: peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=R, target_modules=TARGETS)),
    }


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


def measure(setting: Setting, make: Callable[[Any, Tensor], Callable[[], None]], rounds: int) -> None:
    """Print the times of one setting."""
    tokens = torch.randint(VOCABULARY, (1, setting.tokens))
    calls = {name: make(model, tokens) for name, model in adapted(base_model(setting.d)).items()}
    times = in_turns(calls, rounds)
    for name, own in times.items():
        columns = "  ".join(f"{ratio(own, times[of]):5.2f} of {of}" for of in (PEFT, LORA))
        print(f"  {name:<22} {1e3 * statistics.median(own):8.1f} ms  {columns}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="instead of those of each setting")
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny model")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, peft {peft.__version__}, {torch.get_num_threads()} threads, r={R}, float32")
    for setting in SMOKE if options.smoke else SETTINGS:
        rounds = options.rounds or setting.rounds
        print(f"d={setting.d}, {setting.tokens} tokens, training step")
        measure(setting, training_step, rounds)
        print(f"d={setting.d}, {setting.tokens} tokens, inference")
        measure(setting, inference, rounds)


if __name__ == "__main__":
    main()
