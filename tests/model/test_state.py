"""Copies, pickles and `state_dict`s of a model with several adapters contain all of its state."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import F64, SAVED, adapted, assert_close, config, net, normal, oracle, seen, turn
from torch import Tensor, nn

import hra_fx


def full() -> tuple[nn.Module, nn.Module]:
    """Two active adapters, one of them with copies, and an inactive one with copies of its own."""
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
def test_a_copy_is_in_the_same_state_and_independent(state: str, twin_of: Callable[[Any], Any]) -> None:
    plain, model = full()
    x = normal(4, 6)
    if state == "merged":
        hra_fx.merge_adapter(model, "b")
    if state == "scaled":
        hra_fx.set_scale(model, "a", 0.5)
    if state == "disabled":
        hra_fx.disable_adapters(model)
    wanted, twin, before = model(x), twin_of(model), seen(model)
    assert torch.equal(twin(x), wanted)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    if state == "merged":
        hra_fx.unmerge_adapter(twin)
    hra_fx.set_adapter(twin, "c")
    biases = {f"{path}.bias": twin.get_submodule(path).bias.detach() for path in ("first", "norm", "second", "head")}
    assert_close(twin(x), oracle(plain, twin, ["c"], x, **biases))
    hra_fx.delete_adapter(twin, "a")
    hra_fx.fold(twin, "c")
    assert seen(model) == before


@pytest.mark.parametrize("theirs", ["a", "b", "disabled"], ids=str)
@pytest.mark.parametrize("ours", ["a", []], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a parent"])
def test_a_state_loads_correctly_whichever_adapters_copies_were_in_place(ours: Any, theirs: Any, inside: bool) -> None:
    (plain, model), (_, other) = (adapted(Shared(), a=config("a", **HEAD), b=config("b", **HEAD)) for _ in range(2))
    turn(model, seed=5)
    saver, loader = (nn.ModuleDict({"inner": each}) if inside else each for each in (model, other))
    hra_fx.set_adapter(other, ours)
    if theirs == "disabled":
        hra_fx.disable_adapters(model)
    else:
        hra_fx.set_adapter(model, theirs)
    loader.load_state_dict({key: value.clone() for key, value in saver.state_dict().items()})
    x = normal(4, 6)
    for name in ("a", "b", []):
        for each in (model, other):
            hra_fx.set_adapter(each, name)
        assert torch.equal(other(x), model(x)), name
    assert torch.equal(other(x), plain(x))


HEAD: dict[str, Any] = {"modules_to_save": ["head"], "bias": "all"}


class Shared(nn.Module):
    """Two layers, a bias of its own, and a head with a second name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = (nn.Linear(6, 6, dtype=F64) for _ in range(3))
        self.again = self.head
        self.bias = nn.Parameter(torch.zeros(6, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.a(x))) + self.bias


def test_copies_of_an_adapter_that_the_model_does_not_have_are_reported_and_not_loaded() -> None:
    plain, model = adapted(net(), a=config("first", **SAVED), z=config("second", **SAVED))
    other = hra_fx.transform(net(), config("first", **SAVED), "a")
    hra_fx.set_adapter(model, "z")
    loaded = other.load_state_dict(model.state_dict(), strict=False)
    assert any("of_another_adapter.weight" in key for key in loaded.unexpected_keys)
    x = normal(4, 6)
    with hra_fx.disable_adapters(other):
        assert torch.equal(other(x), plain(x))
    hra_fx.set_adapter(model, "a")
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("state", ["merged", "unmerged", "of the base model"])
def test_a_merged_state_loads_into_a_merged_model_only(state: str) -> None:
    (plain, model), (_, other) = (adapted(net(), a=config("first"), b=config("second")) for _ in range(2))
    turn(other, seed=5)
    hra_fx.merge_adapter(model if state == "merged" else other)
    given = plain.state_dict() if state == "of the base model" else model.state_dict()
    side = "state_dict but not in the model" if state == "merged" else "model but not in the state_dict"
    text = f"adapters are merged in the {side}\\. Call hra_fx\\.merge_adapter or hra_fx\\.unmerge_adapter first"
    values, x = {key: value.clone() for key, value in other.state_dict().items()}, normal(4, 6)
    wanted = other(x)
    with pytest.raises(RuntimeError, match=text):
        other.load_state_dict(given, strict=False)
    assert all(torch.equal(value, values[key]) for key, value in other.state_dict().items())
    assert torch.equal(other(x), wanted)
    if state == "of the base model":
        return
    hra_fx.merge_adapter(other if state == "merged" else model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    hra_fx.unmerge_adapter(other)
    assert_close(other(x), oracle(plain, model, ["a"], x))


def test_dtype_moves_also_what_is_not_in_place() -> None:
    _, model = full()
    hra_fx.set_scale(model, "a", 0.5)
    hra_fx.merge_adapter(model)
    model.float()
    floating = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    wanted = model(normal(4, 6).float())
    hra_fx.unmerge_adapter(model)
    assert_close(model(normal(4, 6).float()), wanted, 1e-5)


def test_a_partial_state_replaces_the_copies_that_it_has() -> None:
    """As a checkpoint of one adapter: it has no entry for the copies that are in place in the model that saved it."""
    (_, model), (_, other) = (adapted(net(), a=config("first", **SAVED), b=config("second", **SAVED)) for _ in range(2))
    turn(model, seed=5)
    state = {key: value.clone() for key, value in model.state_dict().items() if ".b" in key}
    assert "head.hra_saved.b.weight" in state and "head.weight" not in state
    hra_fx.set_adapter(other, "b")
    other.load_state_dict(state, strict=False)
    hra_fx.set_adapter(model, "b")
    x = normal(4, 6)
    assert torch.equal(other(x), model(x))
