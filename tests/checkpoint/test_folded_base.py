"""A base model that already contains an adapter is refused; any other base model is not."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hra_fx
from hra_fx.errors import CheckpointError

Case = tuple[nn.Module, dict[str, Any]]


@pytest.fixture(params=["linear", "linear, Gram-Schmidt", "conv"])
def case(request: pytest.FixtureRequest) -> Case:
    """A model of one layer, and fields of the configuration."""
    if request.param == "conv":
        return nn.Sequential(nn.Conv2d(4, 16, 3)).bfloat16(), {}
    layer = nn.Sequential(nn.Linear(24, 16))
    return (layer, {}) if request.param == "linear" else (layer.bfloat16(), {"apply_GS": True, "init_weights": False})


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    """A trained adapter that changes the weights by some percent."""
    config = hra_fx.HRAConfig(**{"r": 3, "target_modules": ["0"], **fields})
    model = hra_fx.transform(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def test_a_folded_base_is_refused(case: Case, tmp_path: Path) -> None:
    base, fields = case
    model = adapted(base, **fields)
    hra_fx.save_adapter(model, tmp_path / "adapter")
    folded = hra_fx.fold(model)
    with pytest.raises(
        CheckpointError, match=r"already contains the adapter .*very similar one, folded into its weights \(seen in 0\)"
    ):
        hra_fx.load_adapter(folded, tmp_path / "adapter")
    assert [name for name, _ in folded.named_modules()] == ["", "0"]


@pytest.mark.parametrize("other", ["the same", "another dtype", "another model", "another adapter folded"])
def test_other_bases_are_not_refused(other: str, case: Case, tmp_path: Path) -> None:
    base, fields = case
    hra_fx.save_adapter(adapted(base, **fields), tmp_path)
    if other == "another dtype":
        base = base.to(torch.float16)
    elif other == "another model":
        nn.init.normal_(base[0].weight)
    elif other == "another adapter folded":
        base = hra_fx.fold(adapted(base, **fields))
    hra_fx.load_adapter(base, tmp_path)


@pytest.mark.parametrize(("part", "is_refused"), [(0.3, False), (0.6, False), (0.75, True)])
def test_a_base_between_both_is_refused_if_it_is_twice_as_near_to_the_folded_one(
    part: float, is_refused: bool, tmp_path: Path
) -> None:
    """As of a base that another training moved."""
    base = nn.Sequential(nn.Linear(24, 16))
    model = adapted(base)
    hra_fx.save_adapter(model, tmp_path)
    base[0].weight.data.lerp_(hra_fx.fold(model)[0].weight.data, part)
    with pytest.raises(CheckpointError, match="already contains") if is_refused else nullcontext():
        hra_fx.load_adapter(base, tmp_path)


def test_a_fresh_adapter_fits_its_own_folded_base_and_a_merged_one_does_not(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(24, 16))
    fresh = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=4, target_modules=["0"]))
    hra_fx.save_adapter(fresh, tmp_path)
    hra_fx.load_adapter(hra_fx.fold(fresh), tmp_path)
    merged = adapted(base)
    hra_fx.merge_adapter(merged)
    hra_fx.save_adapter(merged, tmp_path)
    hra_fx.load_adapter(base, tmp_path)
    with pytest.raises(CheckpointError, match="This Sequential already contains the adapter"):
        hra_fx.load_adapter(hra_fx.fold(merged), tmp_path)


def test_the_row_is_of_the_layer_that_is_rotated_most(tmp_path: Path) -> None:
    """Layers before it may not have learned anything, or have a first row of zeros."""
    base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))
    base[1].weight.data[0] = 0
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=4, target_modules=["0", "1", "2"]))
    for layer in (model[1], model[2]):
        layer.hra_u["default"].data[..., 1].add_(torch.randn(24, 2), alpha=0.1)
    hra_fx.save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(seen in 2\)"):
        hra_fx.load_adapter(hra_fx.fold(model), tmp_path)
