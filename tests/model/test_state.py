"""Copies, pickles and `state_dict`s of a model with several adapters carry all of its state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, seen, turn
from torch import nn

import hra_fx


def full() -> tuple[nn.Module, nn.Module]:
    """Two active adapters, one of them with copies, and one that waits with copies of its own."""
    saved = {"modules_to_save": ["head", "norm"]}
    plain, model = adapted(
        net(), a=config("first", r=3), b=config("first", "second", **saved), c=config("second", bias="all")
    )
    hra_fx.set_adapter(model, ["b", "a"])
    return plain, model


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("twin_of", [copy.deepcopy, pickled])
@pytest.mark.parametrize("state", ["plain", "merged", "scaled", "disabled"])
def test_a_twin_is_in_the_same_state_and_goes_its_own_way(state: str, twin_of: Callable[[Any], Any]) -> None:
    plain, model = full()
    x = normal(4, 6)
    if state == "merged":
        hra_fx.merge_adapter(model, "b")
    if state == "scaled":
        hra_fx.set_scale(model, "a", 0.5)
    if state == "disabled":
        with hra_fx.disable_adapters(model):
            wanted, twin = model(x), twin_of(model)
            assert torch.equal(twin(x), wanted)
        return
    wanted, twin = model(x), twin_of(model)
    assert torch.equal(twin(x), wanted)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    before = seen(model)
    if state == "merged":
        hra_fx.unmerge_adapter(twin)
    hra_fx.set_adapter(twin, "c")
    biases = {f"{path}.bias": twin.get_submodule(path).bias.detach() for path in ("first", "norm", "second", "head")}
    assert_close(twin(x), oracle(plain, twin, ["c"], x, **biases))
    hra_fx.delete_adapter(twin, "a")
    hra_fx.fold(twin, "c")
    assert seen(model) == before


def test_a_state_loads_into_a_model_with_the_same_active_set() -> None:
    (_, model), (_, other) = full(), full()
    turn(other, seed=5)
    x = normal(4, 6)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    for names in ("c", "a"):
        for each in (model, other):
            hra_fx.set_adapter(each, names)
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("theirs", ["a", "b", []], ids=str)
@pytest.mark.parametrize("ours", ["a", "b", []], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a parent"])
def test_a_state_is_loaded_rightly_whosever_copies_were_in_place(ours: Any, theirs: Any, inside: bool) -> None:
    saved = {"modules_to_save": ["head"]}
    (_, model), (_, other) = (adapted(net(), a=config("first", **saved), b=config("first", **saved)) for _ in range(2))
    turn(model, seed=5)
    hra_fx.set_adapter(model, "b")
    turn(model, seed=6)
    hra_fx.set_adapter(model, theirs)
    hra_fx.set_adapter(other, ours)
    saver, loader = (nn.ModuleDict({"inner": each}) if inside else each for each in (model, other))
    loader.load_state_dict(saver.state_dict())
    x = normal(4, 6)
    for name in ("a", "b", []):
        for each in (model, other):
            hra_fx.set_adapter(each, name)
        assert torch.equal(other(x), model(x)), name


def test_every_key_is_the_base_models_or_an_adapters() -> None:
    plain, model = full()
    added = [key for key in model.state_dict() if key not in plain.state_dict()]
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert all(".hra_u." in key or ".hra_saved." in key for key in added)
    hra_fx.set_adapter(model, "c")
    assert plain.state_dict().keys() <= model.state_dict().keys()


def test_dtype_and_device_move_everything_that_waits() -> None:
    _, model = full()
    hra_fx.set_scale(model, "a", 0.5)
    hra_fx.merge_adapter(model)
    model.float()
    floating = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    wanted = model(normal(4, 6).float())
    hra_fx.unmerge_adapter(model)
    assert_close(model(normal(4, 6).float()), wanted, 1e-5)
