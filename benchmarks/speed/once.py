"""Steps that run once per model: insert an adapter, and merge it into the weights, here and in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from speed.methods import ALL
from speed.models import WORKLOADS
from speed.setting import Setting
from speed.steps import copy_of, plain_model
from speed.timing import Step

METHODS = ("lora", "oft", "peft-hra", "ours")


def steps_once(setting: Setting, methods: Sequence[str]) -> dict[str, Step]:
    """Steps by method: `transform` or `fold` and their equivalents, each on a new copy of the model."""
    base = plain_model(setting)
    make = _insert_step if setting.mode == "transform" else _merge_step
    return {key: make(base, setting, key) for key in methods}


def _adapt(model: nn.Module, setting: Setting, key: str) -> Any:
    return ALL[key].put(model, WORKLOADS[setting.workload], setting.r)


def _insert_step(base: nn.Module, setting: Setting, key: str) -> Step:
    def run(model: Any) -> object:
        return _adapt(model, setting, key)

    return Step(run, ready=lambda: copy_of(base, own_weights=False))


def _merge_step(base: nn.Module, setting: Setting, key: str) -> Step:
    run: Callable[[Any], object] = _folded if key.startswith("ours") else _merged
    return Step(run, ready=lambda: _adapt(copy_of(base, own_weights=True), setting, key))


def _folded(model: Any) -> object:
    import hra_fx

    return hra_fx.fold(model)


def _merged(model: Any) -> object:
    return model.merge_and_unload()
