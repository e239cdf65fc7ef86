"""Host time that adapters add to a tiny Llama with 112 adapted layers, on one thread, relative to PEFT's LoRA.

    PYTHONPATH=benchmarks python benchmarks/host.py        # or: make bench-host

Tensors are so small that the time is that of Python and of launching operators, for which a GPU waits. The time of the
frozen base model is subtracted. All methods take turns in one run. A training step is a forward, a backward and a step
of AdamW; the protected model keeps directions of each layer. Frames are calls of Python functions of hra_fx in a
training step: in an adapted layer, and outside of the layers, for each of them. Needs peft.
"""

from __future__ import annotations

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from turns import in_turns

import hra_fx

BLOCKS, WIDTH, RANK, NEW_TOKENS = 16, 32, 8, 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = hra_fx.HRAConfig(r=RANK, target_modules=TARGETS)
IDS = torch.arange(2).unsqueeze(0)
ROUNDS = {"forward and backward": 60, "training step": 60, "forward without gradients": 100, "generate": 20}
_OURS = str(Path(hra_fx.__file__).parent)
BASE, LORA, OURS, PROTECTED = "base", "PEFT LoRA", "hra_fx", "hra_fx, protected"


def base_model(blocks: int = BLOCKS) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=blocks, vocab_size=32)).requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)  # a backward pass through all layers
    return model


def adapted_model(blocks: int = BLOCKS) -> Any:
    return hra_fx.transform(base_model(blocks), CONFIG)


def protected_model(blocks: int = BLOCKS) -> Any:
    model = adapted_model(blocks)
    hra_fx.protect(model, [{"input_ids": torch.arange(32).view(4, 8)}], directions=RANK)
    return model


def models(blocks: int = BLOCKS) -> dict[str, Any]:
    """The base model, and adapted ones."""
    configs = {
        LORA: peft.LoraConfig(r=RANK, target_modules=TARGETS),
        "PEFT DoRA": peft.LoraConfig(r=RANK, target_modules=TARGETS, use_dora=True),
        "PEFT OFT": peft.OFTConfig(r=0, oft_block_size=RANK, target_modules=TARGETS),
    }
    made: dict[str, Any] = {name: peft.get_peft_model(base_model(blocks), config) for name, config in configs.items()}
    return {BASE: base_model(blocks), OURS: adapted_model(blocks), PROTECTED: protected_model(blocks), **made}


@functools.cache
def ids_on(device: torch.device) -> Tensor:
    return IDS.to(device)


def train(model: Any) -> None:
    ids = ids_on(model.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@functools.cache
def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW as on a GPU, where one operator computes the same for all parameters."""
    return torch.optim.AdamW((one for one in model.parameters() if one.requires_grad), foreach=True)


def step(model: Any) -> None:
    train(model)
    optimizer_of(model).step()
    optimizer_of(model).zero_grad()


def infer(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=ids_on(model.device), use_cache=False)


def generate(model: Any) -> None:
    tokens = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(input_ids=ids_on(model.device), **tokens, do_sample=False, pad_token_id=0)


WORK: dict[str, Callable[[Any], None]] = dict(zip(ROUNDS, (train, step, infer, generate), strict=True))


def frames(model: nn.Module) -> tuple[float, float]:
    """Frames of hra_fx in a forward and backward: in each adapted layer, and outside of them for each layer."""
    layers = [layer for layer in model.modules() if "hra_u" in layer._modules]
    entries = {type(layer).forward.__code__ for layer in layers}
    depth, inside, outside = 0, 0, 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal depth, inside, outside
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(_OURS):
            return
        if frame.f_code in entries:
            depth += 1 if event == "call" else -1
        inside += event == "call" and (depth > 0)
        outside += event == "call" and not depth

    train(model)
    sys.setprofile(count)
    try:
        train(model)
    finally:
        sys.setprofile(None)
    return inside / len(layers), outside / len(layers)


def calls_and_files() -> tuple[int, int]:
    """The calls of Python functions of hra_fx in a forward of two Linear layers with gradients, and their files."""
    made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = hra_fx.transform(made, hra_fx.HRAConfig(r=RANK, target_modules=["0", "1"]))
    files: list[str] = []

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(_OURS):
            files.append(frame.f_code.co_filename)

    x = torch.ones(4, 8)
    model(x)
    sys.setprofile(count)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    return len(files), len(set(files))


def added(made: dict[str, Any], rounds: dict[str, int]) -> Iterator[tuple[str, dict[str, float]]]:
    """For each kind of work: what each method adds to the host time of the base model, relative to PEFT's LoRA.

    On a GPU, calls return before the device has finished, so the time is that of launching; between them, the device
    finishes.
    """
    on_cpu = made[BASE].device.type == "cpu"
    now, settle = (time.process_time, lambda: None) if on_cpu else (time.perf_counter, torch.cuda.synchronize)
    for what, work in WORK.items():
        for model in made.values():
            model.train(work in (train, step))
        calls: dict[str, Callable[[], object]] = {}
        for name, model in made.items():
            calls |= {f"before {name}": settle, name: functools.partial(work, model)}
        times = in_turns(calls, rounds[what], now)
        median = {name: statistics.median(times[name]) for name in made}
        lora = median[LORA] - median[BASE]
        yield what, {name: (own - median[BASE]) / lora for name, own in median.items() if name != BASE}


def walks(model: nn.Module, act: Callable[[nn.Module], object]) -> int:
    """How many times a function walks over all modules of a model."""
    found, named_modules = 0, nn.Module.named_modules

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal found
        found += module is model
        return named_modules(module, *args, **kwargs)

    with mock.patch.object(nn.Module, "named_modules", counted):
        act(model)
    return found


def walks_of_transform_and_load() -> tuple[int, int]:
    transformed = walks(base_model(1), lambda model: hra_fx.transform(model, CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        hra_fx.save_adapter(adapted_model(1), folder)
        return transformed, walks(base_model(1), lambda model: hra_fx.load_adapter(model, folder))


def main() -> None:
    torch.set_num_threads(1)
    made = models()
    print(f"{BLOCKS * len(TARGETS)} adapted layers, torch {torch.__version__}, peft {peft.__version__}")
    for what, found in added(made, ROUNDS):
        print(f"{what:<26}" + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    inside, outside = frames(made[OURS].train())
    print(f"frames of hra_fx per layer: {inside:.1f} in the layer, {outside:.1f} in the batch")
    calls, files = calls_and_files()
    print(f"a forward of two layers: {calls} calls of functions of hra_fx, in {files} files")
    transformed, loaded = walks_of_transform_and_load()
    print(f"walks over the modules: {transformed} in transform, {loaded} in load_adapter")


if __name__ == "__main__":
    main()
