"""Launches per adapted layer ("site") and step: those of an adapted model without those of the frozen base model.

A step is forward and backward. An optimizer does not belong to a layer, and is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch._inductor.config
from torch import nn

from speed.launches import Run, operators
from speed.measuring import start_compiling_anew
from speed.methods import ALL
from speed.models import WORKLOADS
from speed.setting import Setting
from speed.steps import steps_of
from speed.timing import Step, reason


@dataclass(frozen=True)
class PerSite:
    """What the methods launch in a setting.

    Attributes:
        setting: the setting.
        base: launches of a step of the frozen base model.
        launches: by method and by the name of what is launched, per site; negative where the base launches more.
        left_out: by method, why it was not counted.
    """

    setting: Setting
    base: int
    launches: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]

    def total(self, method: str) -> float | None:
        """Of a method; `None` if it was not counted."""
        return sum(self.launches[method].values()) if method in self.launches else None


def per_site(setting: Setting, methods: Sequence[str], count: Callable[[Run], Counter[str]] = operators) -> PerSite:
    """Count the launches of methods.

    Args:
        setting: of mode `gradients`.
        methods: keys of `METHODS`; their compiled forms are counted if the setting is compiled.
        count: gives the launches of one run.

    Raises:
        RuntimeError: the base model could not be counted.
    """
    suffix = "-inductor" if setting.compiled else ""
    if setting.compiled:
        start_compiling_anew()
    with _named_kernels() if setting.compiled else nullcontext():
        steps, left_out = steps_of(setting, [f"{key}{suffix}" for key in ("base", *methods)])
        counts = dict[str, Counter[str]]()
        for key, step in steps.items():
            try:
                counts[key.removesuffix(suffix)] = _counted(step, count)
            except Exception as error:
                left_out[key] = reason(error)
    if "base" not in counts:
        raise RuntimeError(f"The frozen base model could not be counted: {left_out[f'base{suffix}']}")
    base = counts.pop("base")
    sites = len(adapted_layers(setting.workload))
    launches = {key: _difference(found, base, sites) for key, found in counts.items()}
    return PerSite(setting, base.total(), launches, {ALL[key].title: why for key, why in left_out.items()})


def adapted_layers(workload: str) -> list[str]:
    """The names of the layers that get an adapter, by PEFT's rules for lists and regular expressions."""
    with torch.device("meta"):
        model: nn.Module = WORKLOADS[workload].build()
    targets, names = WORKLOADS[workload].targets, [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if name.rpartition(".")[2] in targets]


def _counted(step: Step, count: Callable[[Run], Counter[str]]) -> Counter[str]:
    for _ in range(1 + step.warm_ups):
        step.run(step.ready())
    return count(lambda: step.run(step.ready()))


def _difference(found: Counter[str], base: Counter[str], sites: int) -> dict[str, float]:
    return {name: (found[name] - base[name]) / sites for name in found | base if found[name] != base[name]}


def _named_kernels() -> AbstractContextManager[None]:
    """A context in which inductor's kernels for CPUs are events of the profiler."""
    patched: AbstractContextManager[None] = torch._inductor.config.patch({"cpp.enable_kernel_profile": True})
    return patched
