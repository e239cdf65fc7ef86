"""Models that accelerate offloads or dispatches, before or after `transform`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from itertools import cycle
from pathlib import Path

import accelerate
import pytest
import torch
from integrations.distributed.trained import CASES, Case, adapted, close, output
from safetensors.torch import load_file
from second_device import LAZY
from torch import Tensor, nn

import hra_fx

CPU = torch.device("cpu")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """The first part on the disk, the others in place, with hooks all the same."""
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    places[next(iter(places))] = "disk"
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


def on_devices(model: nn.Module, devices: Sequence[torch.device] = (CPU,), targets: Container[str] = ()) -> nn.Module:
    """The targets in turn on these devices, and all else on the CPU, with hooks on every module."""
    places = dict.fromkeys((name for name, _ in model.named_children()), CPU)
    places |= zip([name for name in places if name in targets], cycle(devices), strict=False)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it takes the CPU for a place to offload to
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "CPU": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "CPU, for another device": lambda model, folder: accelerate.cpu_offload(model, execution_device=LAZY),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "device map": dispatched,
}
DEVICES = {"two devices": (CPU, LAZY), "one device": (CPU,)}
WHEN: dict[str, Callable[[Case, str, Path], nn.Module]] = {
    "before": lambda case, way, folder: adapted(placed(case.base(), case, way, folder), case),
    "after": lambda case, way, folder: placed(case.model(), case, way, folder),
}
#: A case and where it is. On both devices, the base computes the same to 1e-13; Llama's norms are in float32, which
#: rounds.
EVERY = [
    *(("mlp, whole", way) for way in (*OFFLOADS, "two devices")),
    *((name, "CPU") for name in ("mlp, Gram-Schmidt", "convolutions")),
    *(("llama", way) for way in ("CPU", "device map", "one device")),
    *((name, "two devices") for name in ("mlp, copies", "attention", "convolutions")),
    ("llama, checkpointing", "one device"),
]
MLP = CASES["mlp, whole"]
COPIES = CASES["mlp, copies"]


def offload(model: nn.Module, way: str, folder: Path) -> nn.Module:
    OFFLOADS[way](model.eval(), folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


def placed(model: nn.Module, case: Case, way: str, folder: Path) -> nn.Module:
    """Offloaded, or on devices."""
    if way not in DEVICES:
        return offload(model, way, folder)
    return on_devices(model.eval(), DEVICES[way], case.config["target_modules"])


def saved(model: nn.Module, folder: Path, adapter: str = "default") -> dict[str, Tensor]:
    hra_fx.save_adapter(model, folder, adapter)
    hra_fx.save_as_lora(model, folder / "lora", adapter)
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "lora" / "adapter_model.safetensors")


def same_files(
    model: nn.Module, plain: nn.Module, folder: Path, adapter: str = "default", within: float = 1e-9
) -> None:
    wanted, found = saved(plain, folder / "plain", adapter), saved(model, folder / "model", adapter)
    assert wanted.keys() == found.keys()
    assert all(close(wanted[key], found[key], within) for key in wanted)


def same_functions(model: nn.Module, plain: nn.Module, folder: Path, *more: Callable[[nn.Module], object]) -> None:
    """Both MLPs have the same outputs after every change of adapters; then the same report and files."""
    second = hra_fx.transform(MLP.base(), hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
    hra_fx.save_adapter(second, folder / "second")
    steps: list[Callable[[nn.Module], object]] = [
        lambda model: hra_fx.load_adapter(model, folder / "second", "b", is_trainable=True),
        lambda model: hra_fx.set_adapter(model, ["b", "default"]),
        lambda model: hra_fx.set_scale(model, "b", 0.5),
        lambda model: hra_fx.set_scale(model, "b", 1),
        lambda model: hra_fx.load_adapter(model, folder / "second", "b", is_trainable=True),
        lambda model: hra_fx.add_adapter(model, "c", hra_fx.HRAConfig(r=3, target_modules=["2", "4"])),
        lambda model: hra_fx.delete_adapter(model, "c"),
        lambda model: hra_fx.reset_adapters(model, "b"),
        lambda model: hra_fx.set_adapter(model, ["default", "b"]),
        *more,
    ]
    for index, step in enumerate(steps):
        for each in (plain, model):
            torch.manual_seed(3)  # new vectors are random
            step(each)
        assert close(output(model, MLP), output(plain, MLP)), index
        assert close(hra_fx.orthogonality_loss(model), hra_fx.orthogonality_loss(plain)), index
    ours, theirs = hra_fx.report(model).rows, hra_fx.report(plain).rows
    for name in ("share", "angle", "orthogonality"):
        assert [getattr(row, name) for row in ours] == pytest.approx([getattr(row, name) for row in theirs]), name
    same_files(model, plain, folder, "b")
