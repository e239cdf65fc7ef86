"""What offloaded weights do not allow: each error names the layer, and leaves the model unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from adapting import picture
from integrations.distributed.offloading import (
    COPIES,
    CPU,
    MLP,
    OFFLOADS,
    WHEN,
    offload,
)
from integrations.distributed.trained import close, output
from torch import nn

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError


def refuses(model: nn.Module, kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    before, values = picture(model), output(model, MLP)
    found = picture(model)  # a forward replaces the tensors that are offloaded
    with pytest.raises(kind, match=message):
        call()
    after = picture(model)
    assert after["classes"] == before["classes"]
    assert after["keys"] == before["keys"]
    assert after["modes"] == found["modes"]
    assert [entry[2] for entry in after["parameters"]] == [entry[2] for entry in before["parameters"]]  # type: ignore[attr-defined]
    assert torch.equal(output(model, MLP), values)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", OFFLOADS)
def test_merges_and_folds_into_files(way: str, when: str, tmp_path: Path) -> None:
    model = WHEN[when](MLP, way, tmp_path)
    message = "^0: accelerate offloads its weight, but merging keeps a copy of each weight in memory"
    refuses(model, FoldError, message, lambda: hra_fx.merge_adapter(model))
    if not way.startswith("CPU"):
        message = "^0: accelerate loads its weight from files.*fold_checkpoint"
        refuses(model, FoldError, message, lambda: hra_fx.fold(model))
        refuses(model, FoldError, message, lambda: hra_fx.plan_fold(model))
    remove_hook_from_submodules(model)
    model.to(CPU)  # new vectors are where their layers were executed
    hra_fx.merge_adapter(model)
    assert close(output(hra_fx.fold(model), MLP), output(MLP.model(), MLP))


def test_a_comparison_with_folded_weights(tmp_path: Path) -> None:
    model, x = offload(MLP.base(), "CPU", tmp_path), MLP.data()[0]
    settings = hra_fx.HRAConfig(r=2, target_modules=["0"])
    message = "^0: accelerate offloads it, but verify=True needs a copy of the whole model"
    refuses(
        model,
        UnsupportedLayerError,
        message,
        lambda: hra_fx.transform(model, settings, verify=True, example_inputs=x),
    )
    hra_fx.transform(model, settings)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["2"]}, {"bias": "all"}])
def test_new_trained_copies(fields: dict[str, Any], tmp_path: Path) -> None:
    model = offload(MLP.base(), "CPU", tmp_path)
    settings = hra_fx.HRAConfig(r=2, target_modules=["0"], **fields)
    message = "accelerate offloads it, and would overwrite a trained copy with the base model's tensors"
    refuses(model, UnsupportedLayerError, message, lambda: hra_fx.transform(model, settings))
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
    refuses(model, UnsupportedLayerError, message, lambda: hra_fx.add_adapter(model, "b", settings))


@pytest.mark.parametrize("way", OFFLOADS)
def test_trained_copies_that_are_offloaded(way: str, tmp_path: Path) -> None:
    hra_fx.save_adapter(COPIES.model(), tmp_path / "adapter")
    wanted = output(COPIES.model(), COPIES)
    model = offload(COPIES.model(), way, tmp_path / "offload")
    assert close(output(model, COPIES), wanted)
    message = "accelerate offloads it, with its trained copies|accelerate loads its weight from files"
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.disable_adapters(model)),
        (AdapterError, lambda: hra_fx.delete_adapter(model, "default")),
        (AdapterError, lambda: hra_fx.save_adapter(model, tmp_path / "other")),
        (AdapterError, lambda: hra_fx.load_adapter(model, tmp_path / "adapter")),
        (AdapterError, lambda: hra_fx.save_as_lora(model, tmp_path / "lora")),
        (FoldError, lambda: hra_fx.fold(model)),
    ]
    for kind, call in calls:
        refuses(model, kind, message, call)
    hra_fx.set_adapter(model, "default")  # exchanges nothing
    remove_hook_from_submodules(model)
    assert close(output(hra_fx.fold(model.to(CPU)), COPIES), wanted)


def test_modules_that_are_offloaded_as_a_whole(tmp_path: Path) -> None:
    blocks = ["Sequential"]
    base = accelerate.cpu_offload(nn.Sequential(MLP.base()), execution_device=CPU, preload_module_classes=blocks)
    settings = hra_fx.HRAConfig(r=2, target_modules=["0.0"])
    message = r"the model: accelerate offloads it as a whole \(preload_module_classes\)"
    refuses(base, UnsupportedLayerError, message, lambda: hra_fx.transform(base, settings))
    model = hra_fx.transform(nn.Sequential(MLP.base()), settings)
    wanted = output(model, MLP)
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=blocks)
    assert close(output(model, MLP), wanted)
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.save_adapter(model, tmp_path / "other")),
        (AdapterError, lambda: hra_fx.orthogonality_loss(model)),
        (FoldError, lambda: hra_fx.fold(model)),
        (UnsupportedLayerError, lambda: hra_fx.add_adapter(model, "b", settings)),
    ]
    for kind, call in calls:
        refuses(model, kind, message, call)


def test_quantized_weights_without_data() -> None:
    """accelerate cannot load them again on a CPU, with or without an adapter."""
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64)).to("cpu")
    accelerate.cpu_offload(model, execution_device=CPU)
    with pytest.raises(UnsupportedLayerError, match="its weight is on the meta device and has no data"):
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
