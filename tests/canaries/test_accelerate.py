"""What hra_fx reads of accelerate's hooks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from canaries.canary import canary
from integrations.distributed import test_dispatched, test_offloaded

hooks = functools.partial(canary, "accelerate", reader="hra_fx/layers/accelerate_hooks.py")


@hooks("`_hf_hook` and `_old_forward` of a module", breaks="adapters in models with a device map or offloading")
def test_a_hooked_module() -> None:
    test_dispatched.test_hooks_come_and_go("transform, hooks, off, fold, hooks")


@hooks("`SequentialHook.hooks` and `AlignDevicesHook.offload`", breaks="adapters in offloaded models")
@pytest.mark.parametrize("way", ["CPU", "CPU, in a device map"])
def test_offloaded_layers(way: str, tmp_path: Path) -> None:
    test_offloaded.test_a_model_does_what_it_does_in_memory("mlp, whole", way, "before", tmp_path)


@hooks(
    "`weights_map`, `PrefixedDataset` or `OffloadedWeightsLoader`", breaks="fold, merge and save of offloaded models"
)
@pytest.mark.parametrize("way", ["CPU", "disk", "device map"])
def test_where_the_offloaded_tensors_are(way: str, tmp_path: Path) -> None:
    test_offloaded.test_functions_that_need_the_vectors(way, "after", tmp_path)
    test_offloaded.test_merges_and_folds_into_files(way, "after", tmp_path / "refused")
