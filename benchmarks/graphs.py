"""The time of a training step of a graph, relative to eager mode, and of its capture: Llamas of several sizes.

    PYTHONPATH=benchmarks python benchmarks/graphs.py

A graph of `transform(trace=True)` and the eager model take turns, and so do the plain model and its own graph, which
shows what the capture itself changes: the graph of a language model always has a mask.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn
from turns import in_turns, ratio

import hra_fx
from hra_fx.tracing.capture_layers import capture_layers

#: Width, layers, batch and length.
SIZES = ((64, 8, 2, 16), (256, 8, 4, 64), (576, 4, 4, 64))
LAYERS_CAPTURED, ROUNDS = 32, 20


def llama(width: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 512}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def step_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        model(**inputs).loss.backward()
        model.zero_grad()
        if inputs["input_ids"].is_cuda:
            torch.cuda.synchronize()

    return step


def steps(
    width: int, layers: int, batch: int, length: int, *, rounds: int = ROUNDS, device: str = "cpu"
) -> tuple[float, float]:
    """The time of a step of the graph, relative to eager mode: with adapters, and without."""
    config = hra_fx.HRAConfig(r=8, target_modules="all-linear")
    base = llama(width, layers).to(device)
    ids = torch.randint(0, 512, (batch, length), device=device)
    inputs = {"input_ids": ids, "labels": ids}
    models = {
        "eager": hra_fx.transform(copy.deepcopy(base), config),
        "graph": hra_fx.transform(copy.deepcopy(base), config, trace=True, example_inputs=inputs),
        "plain": base,
        "plain graph": capture_layers(base, ((), inputs)),
    }
    times = in_turns({name: step_of(model, inputs) for name, model in models.items()}, rounds)
    return ratio(times["graph"], times["eager"]), ratio(times["plain graph"], times["plain"])


def main() -> None:
    for width, layers, batch, length in SIZES:
        adapted, plain = steps(width, layers, batch, length)
        print(
            f"{layers} layers of width {width}, {batch} x {length} tokens: a step of the graph takes {adapted:.2f} of "
            f"eager mode's; without adapters {plain:.2f}",
            flush=True,
        )
    model, config = llama(64, LAYERS_CAPTURED), hra_fx.HRAConfig(r=8, target_modules="all-linear")
    start = time.process_time()
    hra_fx.transform(model, config, trace=True)
    print(f"Capture of {LAYERS_CAPTURED} layers: {time.process_time() - start:.1f} s of CPU time")


if __name__ == "__main__":
    main()
