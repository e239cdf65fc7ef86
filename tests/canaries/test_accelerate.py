"""What hra_fx reads of accelerate's hooks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from canaries.canary import canary
from torch import nn

from hra_fx.layers import accelerate_hooks

READER = "hra_fx/layers/accelerate_hooks.py"
hooks = functools.partial(canary, "accelerate", reader=READER)
CPU = torch.device("cpu")


@hooks("`_hf_hook` and `_old_forward` of a module", breaks="adapters in models with a device map or offloading")
def test_a_hooked_module() -> None:
    layer: Any = nn.Linear(3, 2)
    assert not accelerate_hooks.is_hooked(layer)
    add_hook_to_module(layer, AlignDevicesHook(execution_device=CPU, io_same_device=True))
    assert {"_hf_hook", "_old_forward", "forward"} <= vars(layer).keys()
    assert accelerate_hooks.calls_class_forward(layer), "a hook that only moves the inputs"
    # `keep_loaded` removes the hook by deleting these three.
    kept = vars(layer).keys() - {"_hf_hook", "_old_forward", "forward"}
    remove_hook_from_module(layer)
    assert kept == vars(layer).keys() - {"forward"}


@hooks("`SequentialHook.hooks` and `AlignDevicesHook.offload`", breaks="adapters in offloaded models")
def test_a_hook_of_several() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight.detach().clone()
    add_hook_to_module(layer, SequentialHook(AlignDevicesHook(execution_device=CPU, offload=True)))
    hook = accelerate_hooks.offloading_hook(layer)
    assert isinstance(hook, AlignDevicesHook)
    assert hook.place_submodules is False, "it offloads the tensors of its own module only"
    with accelerate_hooks.loaded(layer):
        assert torch.equal(layer.weight, weight)
    assert layer.weight.is_meta


OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "own": lambda model, folder: add_hook_to_module(model[0], AlignDevicesHook(CPU, offload=True)),  # type: ignore[index]
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
}


@pytest.mark.parametrize("way", OFFLOADS)
@hooks(
    "`weights_map`, `PrefixedDataset` or `OffloadedWeightsLoader`", breaks="fold, merge and save of offloaded models"
)
def test_where_the_offloaded_tensors_are(way: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    weight = model[0].weight.detach().clone()
    OFFLOADS[way](model, tmp_path)
    layer: Any = model[0]
    assert layer.weight.is_meta
    assert accelerate_hooks.device_of(layer, layer.weight) == CPU
    with accelerate_hooks.loaded(layer):
        assert torch.equal(layer.weight, weight), "`pre_forward` of the hook loads the tensors"
    assert layer.weight.is_meta, "`post_forward` offloads them"
    assert accelerate_hooks.is_on_disk(layer, "weight") is (way == "disk")
    if way == "disk":
        return
    assert torch.equal(accelerate_hooks.stored(layer, "weight", layer.weight), weight)
    with accelerate_hooks.loaded(layer):
        layer.weight.data.zero_()
        accelerate_hooks.store(layer, "weight")
    x = torch.ones(1, 3)
    assert torch.equal(model(x)[0], accelerate_hooks.stored(layer, "bias", layer.bias)), "the next forward reads it"
