"""Models that accelerate offloads, before or after `transform`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import accelerate
import torch
from integrations.distributed.trained import CASES, Case, adapted
from second_device import LAZY
from torch import nn

CPU = torch.device("cpu")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """The first part on the disk, the others in place, with hooks all the same."""
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    places[next(iter(places))] = "disk"
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


def partly(model: nn.Module, folder: Path) -> nn.Module:
    """The first part in CPU memory, the others on a device, which executes all of them."""
    places = {name: LAZY for name, _ in model.named_children()}
    places[next(iter(places))] = "cpu"  # type: ignore[assignment]
    return accelerate.dispatch_model(model, places, main_device=LAZY)


OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "CPU": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "CPU, for another device": lambda model, folder: accelerate.cpu_offload(model, execution_device=LAZY),
    "CPU, in a device map": partly,
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "device map": dispatched,
}
WHEN: dict[str, Callable[[Case, str, Path], nn.Module]] = {
    "before": lambda case, way, folder: adapted(offload(case.base(), way, folder), case),
    "after": lambda case, way, folder: offload(case.model(), way, folder),
}
MODELS = ["mlp, Gram-Schmidt", "convolutions", "llama"]
EVERY = [(name, "CPU") for name in MODELS] + [("llama", "disk"), ("llama", "device map")]
EVERY += [("mlp, whole", way) for way in OFFLOADS]
MLP = CASES["mlp, whole"]
COPIES = CASES["mlp, copies"]


def offload(model: nn.Module, way: str, folder: Path) -> nn.Module:
    OFFLOADS[way](model.eval(), folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model
