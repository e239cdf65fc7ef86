"""Memory and time of a training step with adapters on the experts of a mixture of experts, here and in PEFT's LoRA.

    make bench-moe

Needs peft. One Qwen3-MoE and one gpt-oss of two layers with random weights, both parameters of the experts adapted
with rank 8, in each implementation of the experts. Memory is the peak over two steps beyond what the process had, in a
process for each method (`speed/memory.py`). Times are medians of ratios; the methods take turns.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import peft
import torch
from speed.memory import last_number
from speed.memory_of_one import forget_the_peak, status
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from turns import in_turns, ratio

import hra_fx

RANK, LAYERS, EXPERTS, D, OUT = 8, 2, 16, 512, 256
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
METHODS = ("base", "lora", "hra")
MODELS = ("qwen3-moe", "gpt-oss")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
#: Tokens of a step; the batched products gather a weight for each token, which is for few of them.
TOKENS = {"eager": 512, "batched_mm": 32, "grouped_mm": 512}
Step = Callable[[], None]


def base_model(kind: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": D,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_experts_per_tok": 2,
        "use_cache": False,
        "pad_token_id": None,
    }
    model: Any
    if kind == "gpt-oss":
        model = GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=EXPERTS, intermediate_size=OUT))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=OUT))
    model.set_experts_implementation(implementation)
    made: nn.Module = model
    return made


def adapted(model: nn.Module, method: str) -> nn.Module:
    if method == "hra":
        return hra_fx.transform(model, hra_fx.HRAConfig(r=RANK, target_parameters=TARGETS))
    if method == "lora":
        config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS)
        made: nn.Module = peft.get_peft_model(model, config)
        return made
    return model.requires_grad_(False)


def step_of(kind: str, implementation: str, method: str) -> Step:
    """A training step; the frozen base has a gradient for its input only, as below other adapters."""
    base = base_model(kind, implementation)
    model = adapted(base, method)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    ids = torch.randint(512, (1, TOKENS[implementation]))
    embedded = base.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    embedded.requires_grad_(method == "base")

    def step() -> None:
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        embedded.grad = None

    return step


def peak_here(kind: str, implementation: str, method: str) -> int:
    """How far two steps raise the peak over what this process has, after a first step, which fills caches."""
    step_of(kind, implementation, method)()
    step = step_of(kind, implementation, method)
    gc.collect()
    forget_the_peak()
    before = status("VmRSS")
    step()
    step()
    return status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=3)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_here(*arguments.peak))
        return
    print(f"{LAYERS} layers, {EXPERTS} experts, {D} to {OUT}, r = {RANK}, float32, torch {torch.__version__}")
    print("| model | experts | tokens | memory: base | LoRA | hra_fx | over LoRA | time over LoRA | over base |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for kind in MODELS:
        for implementation in IMPLEMENTATIONS:
            base, lora, hra = (
                last_number(__file__, "--peak", kind, implementation, method) / 1e6 for method in METHODS
            )
            own = in_turns({method: step_of(kind, implementation, method) for method in METHODS}, arguments.rounds)
            cells = [f"{base:.0f} MB", f"{lora:.0f} MB", f"{hra:.0f} MB", f"{hra / lora:.2f}"]
            cells += [f"{ratio(own['hra'], own[other]):.2f}" for other in ("lora", "base")]
            print(f"| {kind} | {implementation} | {TOKENS[implementation]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
