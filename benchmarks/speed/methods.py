"""The methods that are measured: ways to adapt a model, and the base model itself.

The lists at the end say which methods are in which table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from speed.models import Workload


@dataclass(frozen=True)
class Method:
    """One way to run a model.

    Attributes:
        title: its name in tables.
        put: adapts a frozen base model, which it may change; takes the model, the workload and the rank.
        own_weights: whether it has its own copy of the base weights. All others share them, so that their place in
            memory does not affect ratios.
        compiled: arguments of `torch.compile`, if the model is compiled.
    """

    title: str
    put: Callable[[nn.Module, Workload, int], nn.Module]
    own_weights: bool = False
    compiled: Mapping[str, Any] | None = None


def _plain(base: nn.Module, workload: Workload, r: int) -> nn.Module:
    return base


def _lora(base: nn.Module, workload: Workload, r: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=0.0, target_modules=workload.targets)
    return peft.get_peft_model(base, config)


def _peft_hra(base: nn.Module, workload: Workload, r: int) -> nn.Module:
    import peft

    config = peft.HRAConfig(r=r, target_modules=workload.targets)
    return peft.get_peft_model(base, config)


def _ours(base: nn.Module, workload: Workload, r: int, **settings: Any) -> nn.Module:
    import hra_fx

    return hra_fx.transform(base, hra_fx.HRAConfig(r=r, target_modules=workload.targets, **settings))


def _ours_gs(base: nn.Module, workload: Workload, r: int) -> nn.Module:
    return _ours(base, workload, r, apply_GS=True)


def _folded(base: nn.Module, workload: Workload, r: int) -> nn.Module:
    import hra_fx

    return hra_fx.fold(_ours(base, workload, r)).requires_grad_(False)


METHODS: dict[str, Method] = {
    "base": Method("frozen base", _plain),
    "base-again": Method("base again", _plain, own_weights=True),
    "lora": Method("PEFT LoRA", _lora),
    "peft-hra": Method("PEFT HRA", _peft_hra),
    "ours": Method("hra_fx", _ours),
    "ours-gs": Method("hra_fx, GS", _ours_gs),
    "folded": Method("folded", _folded, own_weights=True),
}

COMPILED: dict[str, Method] = {
    f"{key}-inductor": replace(METHODS[key], compiled={"backend": "inductor", "dynamic": False})
    for key in ("base", "lora", "ours")
}
ALL: dict[str, Method] = {**METHODS, **COMPILED}

TRAINING = ("base", "base-again", "lora", "peft-hra", "ours", "ours-gs")
INFERENCE = (*TRAINING, "folded")
COMPILERS = tuple(COMPILED)
