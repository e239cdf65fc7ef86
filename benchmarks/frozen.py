"""The speedup by `freeze`: exported programs compiled by inductor, with an adapter, a frozen adapter, and PEFT's LoRA.

    PYTHONPATH=benchmarks python benchmarks/frozen.py

Needs peft. A Llama of width 768 with 3 layers. Prints medians of ratios with their intervals.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from speed.methods import METHODS
from speed.models import WORKLOADS
from speed.ratios import ratio
from speed.setting import Setting
from speed.steps import copy_of, plain_model
from speed.timing import Budget, Step, clocked, interleave
from torch import nn

import hra_fx

TOKENS = (1, 16, 512)


def program_of(method: str, setting: Setting, *, freeze: bool = False) -> Callable[[], object]:
    """A function that calls the exported and compiled model of a method."""
    workload = WORKLOADS[setting.workload]
    model = METHODS[method].put(copy_of(plain_model(setting), own_weights=False), workload, setting.r).eval()
    wrapped: nn.Module = Logits(getattr(model, "base_model", model) if method == "lora" else model)
    ids = workload.batch(setting.size)["input_ids"]
    program = torch.export.export(wrapped, (ids,), strict=False)
    compiled = torch.compile((hra_fx.freeze(program) if freeze else program).module(), dynamic=False)
    return lambda: compiled(ids)


class Logits(nn.Module):
    """A language model whose output is one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; relative to PEFT LoRA, exported and compiled")
    for tokens in TOKENS:
        setting = Setting("llama-768x3", "inference", tokens)
        calls = {
            "base": program_of("base", setting),
            "lora": program_of("lora", setting),
            "ours": program_of("ours", setting),
            "ours, frozen": program_of("ours", setting, freeze=True),
        }
        with torch.no_grad():
            steps = {name: Step(lambda _, call=call: call(), warm_ups=2) for name, call in calls.items()}
            measured = interleave(steps, Budget(15), clocked)
        for name in ("base", "ours", "ours, frozen"):
            found = ratio(measured.values[name], measured.values["lora"])
            assert found is not None
            print(f"{tokens:4} tokens  {name:13} {found.median:.3f} ({found.low:.3f} to {found.high:.3f})", flush=True)


if __name__ == "__main__":
    main()
