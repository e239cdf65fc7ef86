"""Blocks in torch's `checkpoint_wrapper`, which puts a name into the paths of modules, but not of `state_dict`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import hra_fx

CONFIG = hra_fx.HRAConfig(r=3, target_modules=["up"], modules_to_save=["down"], bias="all", init_weights=False)


def base(*, wrapped: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [OrderedDict(up=nn.Linear(6, 6), down=nn.Linear(6, 6)) for _ in range(2)]
    model = nn.Sequential(*map(nn.Sequential, blocks)).double()
    return wrap(model) if wrapped else model


def wrap(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda part: type(part) is nn.Sequential and part is not model)
    return model


@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_adapters_are_those_of_the_model_without_wrappers(first: str, tmp_path: Path) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    plain = hra_fx.transform(base(wrapped=False), CONFIG)
    wanted = plain(x)
    torch.manual_seed(1)
    model = hra_fx.transform(base(wrapped=first == "wrapped"), CONFIG)
    model = model if first == "wrapped" else wrap(model)
    for part, folder in ((plain, "plain"), (model, "model")):
        hra_fx.save_adapter(part, tmp_path / folder)
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("plain", "model")]
    assert files[0] == files[1]
    torch.testing.assert_close(model(x), wanted)
    hra_fx.reset_adapters(model)
    assert not torch.equal(model(x), wanted)
    hra_fx.load_adapter(model, tmp_path / "plain")
    torch.testing.assert_close(model(x), wanted)
    assert [row.path for row in hra_fx.report(model).rows] == ["0.up", "1.up"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(hra_fx.fold(model)(x), wanted)
    loaded = hra_fx.load_adapter(base(wrapped=True), tmp_path / "model")
    torch.testing.assert_close(loaded(x), wanted)
