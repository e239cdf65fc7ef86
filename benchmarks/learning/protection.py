"""What `hra_fx.protect` and quiet pairs change: SmolLM2 learns posts of 20 Newsgroups, and should keep Grimm's tales.

    PYTHONPATH=benchmarks:examples python -m learning.protection --seeds 0 3 4      # 2 runs for each seed, minutes each
    PYTHONPATH=benchmarks:examples python -m learning.protection --methods hra-pairs hra-quiet --directions 0

The protected directions come from 64 passages of the tales that are not tested. Perplexities of the test posts and of
48 other passages (lower is better), and the facts that the model still completes correctly.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from typing import Any

import torch
import transformers
from torch import nn

import hra_fx
from learning import training
from learning.bfloat16 import BaseProducts
from learning.methods import METHODS, layer_shapes
from learning.tasks.language import Language, tales_to_keep
from learning.tasks.task import Task


def run(seed: int, name: str, rate: float, directions: int) -> dict[str, float]:
    """Train once, with or without protected directions."""
    task, method = Language(seed), METHODS[name]
    model: Any = task.model()
    rank = method.rank(layer_shapes(model, task.targets), task.lora_rank)

    def prepare(optimizer: torch.optim.Optimizer, model: nn.Module, _: Task) -> None:
        method.prepare_optimizer(optimizer, model, task)
        if directions:
            hra_fx.protect(optimizer, model, tales_to_keep().split(8), directions)

    with BaseProducts(model):
        torch.manual_seed(seed)
        method.insert(model, task, rank)
        training.fit(model, nn.Module(), task, dataclasses.replace(method, prepare_optimizer=prepare), rate)
        return {"validation": task.validate(model), "test": task.test(model), **task.retention(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 3, 4])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["hra-pairs"])
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--directions", type=int, nargs="+", default=[0, 16])
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for method, directions in itertools.product(options.methods, options.directions):
            scores = run(seed, method, options.rate, directions)
            found = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
            print(f"seed {seed}, {method}, {directions} directions per layer protected: {found}", flush=True)


if __name__ == "__main__":
    main()
