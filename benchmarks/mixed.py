"""Time of a batch of 64 rows with 64 adapters, compared with one adapter for all rows, here and in PEFT's LoRA.

    make bench-mixed

Needs peft. The calls take turns, and processor time is counted, so that other programs on the machine have less effect.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from turns import in_turns, ratio

import hra_fx

ROWS, ROUNDS, RANK = 64, 7, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
NAMES = [f"task{row}" for row in range(ROWS)]
OURS, MIXED = "hra_fx, one adapter", "hra_fx, 64 adapters"
LORA, LOOP = "PEFT LoRA, one adapter", "PEFT LoRA, 64 adapters"


def base_model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=12, pad_token_id=0, **shape))
    return model.eval()


def ours() -> Any:
    config = hra_fx.HRAConfig(r=RANK, target_modules=TARGETS, init_weights=False)
    model = hra_fx.HRAModel(base_model(), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def lora() -> Any:
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    model: Any = peft.get_peft_model(base_model(), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def calls(run: Callable[..., object]) -> dict[str, Callable[[], object]]:
    """The same call of both models, with one adapter and with 64."""
    return {
        OURS: lambda: run(MODELS[OURS]),
        MIXED: lambda: run(MODELS[OURS], adapter_names=NAMES),
        LORA: lambda: run(MODELS[LORA]),
        LOOP: lambda: run(MODELS[LORA], adapter_names=NAMES),
    }


def forward(tokens: int) -> Callable[..., object]:
    ids = torch.randint(1, 1024, (ROWS, tokens))
    return lambda model, **options: model(input_ids=ids, use_cache=False, **options)


def generate(tokens: int, new: int) -> Callable[..., object]:
    ids = torch.randint(1, 1024, (ROWS, tokens))
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return lambda model, **options: model.generate(input_ids=ids, **fixed, **options)


WORK: dict[str, Callable[..., object]] = {
    "forward, 1 token": forward(1),
    "forward, 16 tokens": forward(16),
    "generate, 8 tokens after 16": generate(16, 8),
}
MODELS = {OURS: ours(), LORA: lora()}


@torch.no_grad()
def main() -> None:
    print(f"{ROWS} rows, rank {RANK}, float32, torch {torch.__version__}, peft {peft.__version__}")
    for work, run in WORK.items():
        times = in_turns(calls(run), ROUNDS, time.process_time)
        print(work)
        for name, own in times.items():
            one = times[OURS if name in (OURS, MIXED) else LORA]
            print(f"  {name:<23} {1e3 * statistics.median(own):8.1f} ms, {ratio(own, one):5.2f} of one adapter")


if __name__ == "__main__":
    main()
