"""Copies of an adapted model: deepcopy, pickle, `torch.save` and `state_dict`, edited before their first call too."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from capture.checks import adapt, assert_equals_oracle, assert_whole, fresh, inputs, spied, turn
from capture.models import Convolutions, Host, Optional, Stack
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import regions_of

X = inputs(4, 6)
IMAGES = inputs(2, 3, 6, 6)
MODELS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "whole": (Stack, X),
    "regions": (Host, X),
    "optional": (Optional, X),
    "convolutions": (Convolutions, IMAGES),
}


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: nn.Module = torch.load(file, weights_only=False)
    return again


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "twice": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize("called", [False, True], ids=["never called", "called"])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_a_model_of_its_own(name: str, copied: str, called: bool) -> None:
    make, x = MODELS[name]
    adapted, base = adapt(make())
    if called:
        assert_equals_oracle(adapted, base, x)
    again = COPIES[copied](adapted)
    assert type(again) is type(adapted)
    assert list(again.state_dict()) == list(adapted.state_dict())
    assert hra_fx.report(again).to_dicts() == hra_fx.report(adapted).to_dicts()
    assert not {id(p) for p in again.parameters()} & {id(p) for p in adapted.parameters()}
    base_again = copy.deepcopy(base)
    spy = spied(again, x)
    assert_equals_oracle(again, base_again, x)
    assert spy.runs >= 3, "the copy runs its graphs"
    turn(again, value=21)
    assert_equals_oracle(again, base_again, x)
    assert_equals_oracle(adapted, base, x)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_that_is_edited_before_its_first_call(copied: str) -> None:
    edits: list[Callable[[nn.Module], object]] = [
        lambda model: setattr(model.blocks[0], "rate", 0.9),
        lambda model: setattr(model, "scale", nn.Tanh()),
        lambda model: setattr(model.scale, "rate", -1.0),
        lambda model: setattr(model.scale, "function", torch.sin),
        lambda model: model.scale.register_forward_hook(double),
        lambda model: setattr(model.stem, "bias", None),
    ]
    for edit in edits:
        adapted, base = adapt(Stack())
        again = COPIES[copied](adapted)
        edit(again)
        edited = copy.deepcopy(base)
        edit(edited)
        assert_equals_oracle(again, edited, X)
        assert_equals_oracle(adapted, base, X)


def double(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def test_a_copy_of_an_edited_model() -> None:
    adapted, base = adapt(Stack())
    assert_equals_oracle(adapted, base, X)
    for model in (adapted, base):
        model.scale.rate = 7.0
    again = copy.deepcopy(adapted)
    assert_equals_oracle(again, base, X)


def test_a_copy_of_a_part() -> None:
    """A part of a whole model has no region, and its sites have their reflections."""
    adapted, base = adapt(Stack())
    part, plain = copy.deepcopy(adapted.blocks[0]), copy.deepcopy(base.blocks[0])
    assert_equals_oracle(part, plain, inputs(4, 8))


def test_a_copy_of_a_region() -> None:
    adapted, base = adapt(Host())
    assert set(regions_of(adapted)) == {"left", "right"}
    left, plain = copy.deepcopy(adapted.left), copy.deepcopy(base.left)
    spy = spied(left, X)
    assert_equals_oracle(left, plain, X)
    assert spy.runs == 3


def test_a_region_that_moves_to_another_model() -> None:
    adapted, base = adapt(Host())
    moved, plain = nn.Sequential(adapted.left, nn.Tanh()), nn.Sequential(base.left, nn.Tanh())
    assert_equals_oracle(moved, plain, X)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_into_a_fresh_model(name: str) -> None:
    make, x = MODELS[name]
    adapted, base = adapt(make())
    state = copy.deepcopy(adapted.state_dict())
    assert set(base.state_dict()) <= set(state)
    config = next(iter(vars(adapted)["_hra_record"].configs.values()))
    again = hra_fx.transform(fresh(make(), value=33), config)
    again.load_state_dict(state, strict=True)
    assert_equals_oracle(again, copy.deepcopy(base), x)
    assigned = hra_fx.transform(fresh(make(), value=34), config, low_cpu_mem_usage=True)
    assert any(parameter.is_meta for parameter in assigned.parameters())
    assigned.load_state_dict(state, strict=True, assign=True)
    for name_of, parameter in assigned.named_parameters():
        parameter.requires_grad_("hra_u" in name_of)
    assigned = copy.deepcopy(assigned)  # assigning shares the buffers of the state
    assert_equals_oracle(assigned, copy.deepcopy(base), x)


def test_to_another_dtype_and_back() -> None:
    adapted, base = adapt(Stack())
    assert_whole(adapted)
    adapted.float()
    assert adapted(X.float()).dtype == torch.float32
    adapted.double()
    with torch.no_grad():
        for name, value in base.state_dict().items():
            value.copy_(adapted.state_dict()[name])
    assert_equals_oracle(adapted, base, X)


def test_shallow_copy_shares_parameters() -> None:
    adapted, base = adapt(Stack())
    again = copy.copy(adapted)
    assert type(again) is type(adapted)
    assert_equals_oracle(again, base, X)
