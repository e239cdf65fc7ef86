"""What `protect` refuses, with the model unchanged."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from training.test_protect import adapted

import hra_fx
from hra_fx.errors import AdapterError, ConfigError


def test_what_cannot_be_protected_is_refused_and_nothing_is_changed() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0", "2")
    x, before = torch.randn(4, 6), copy.deepcopy(model.state_dict())
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    for batches, directions, used, kind, message in (
        ([], 2, optimizer, AdapterError, r"`batches` is empty"),
        ([x * math.nan], 2, optimizer, AdapterError, r"^0: its inputs contain NaN or infinite values"),
        (
            [x],
            4,
            optimizer,
            ConfigError,
            r"at most half of the width of each layer, got 4 for 0\.hra_u\.default of width",
        ),
        ([x], 0, optimizer, ConfigError, r"`directions` must be a positive int, got 0"),
        ([x], 2, other, AdapterError, r"no vectors of Sequential.* call protect before"),
        ([x], 2, torch.optim.ASGD(list(optimizer.param_groups[0]["params"])), AdapterError, r"ASGD averages the param"),
        ([x], 2, None, AdapterError, r"must be a torch\.optim\.Optimizer, got NoneType"),
        (["text"], 2, optimizer, AdapterError, r"^a batch must be a tensor, .* got str\."),
        (x, 2, optimizer, AdapterError, r"`batches` must be an iterable of batches, got one batch \(Tensor"),
        ({"input": x}, 2, optimizer, AdapterError, r"`batches` must be an iterable of batches, got one batch \(dict"),
        ([torch.randn(2, 7)], 2, optimizer, RuntimeError, "shapes cannot be multiplied"),  # from the model
    ):
        with pytest.raises(kind, match=message):
            hra_fx.protect(used, model, batches, directions)
    with pytest.raises(AdapterError, match=r"^Linear is a submodule of a transformed model\. Pass the model"):
        hra_fx.protect(optimizer, model[0], [x], 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "hra_protected" not in optimizer.param_groups[0] and not model[0]._forward_pre_hooks


def test_adapters_that_do_not_act_as_they_are_and_other_paths_are_refused() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0")
    x = torch.randn(2, 6)
    hra_fx.protect(optimizer, model, [x], 2)
    wrapped = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    hra_fx.protect(wrapped, nn.Sequential(model), [x], 2)
    with pytest.raises(AdapterError, match=r"do not have protected directions for the same layer"):
        wrapped.load_state_dict(optimizer.state_dict())
    model.double()(x.double()).sum().backward()
    optimizer.step()  # in the new dtype
    hra_fx.merge_adapter(model)
    with pytest.raises(AdapterError, match=r"^0\.hra_u\.default is merged into the weight\. Unmerge"):
        hra_fx.protect(optimizer, model, [x.double()], 2)
    few, steps = adapted(nn.Sequential(nn.Linear(8, 8)), "0", r=5, apply_GS=True)
    with pytest.raises(ConfigError, match=r"`r` \+ `directions` must be less than the width, got 5 \+ 3 for width 8"):
        hra_fx.protect(steps, few, [torch.randn(2, 8)], 3)


def test_two_models_with_the_same_paths_need_two_optimizers() -> None:
    models = [adapted(nn.Sequential(nn.Linear(6, 8)), "0")[0] for _ in range(2)]
    optimizer = torch.optim.AdamW([one for model in models for one in model.parameters() if one.requires_grad])
    hra_fx.protect(optimizer, models[0], [torch.randn(2, 6)], 2)
    with pytest.raises(AdapterError, match=r"already protects other layers with these paths: 0\. Its state"):
        hra_fx.protect(optimizer, models[1], [torch.randn(2, 6)], 2)
    hra_fx.protect(optimizer, models[0], [torch.randn(2, 6)], 2)
