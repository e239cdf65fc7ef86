"""Trained copies of modules and biases, each adapter's own; and the `state_dict` of a model with several adapters.

`test_any_order.py` trains, switches and copies a head among other steps.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import SAVED, adapted, assert_close, config, flags, net, normal, oracle, refuses, turn
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import hra_fx

HEAD: dict[str, Any] = {"modules_to_save": ["head"]}


def train_step(model: nn.Module, x: Tensor) -> set[str]:
    """Take one step. Returns the names of the parameters that changed."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(x).square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(("bias", "trained"), [("all", {"first", "norm", "second", "head"}), ("hra_only", {"second"})])
def test_biases_are_each_adapters_own(bias: str, trained: set[str]) -> None:
    plain, model = adapted(net(), a=config("second", bias=bias), b=config("first", bias="hra_only"))
    assert train_step(model, normal(8, 6)) == {"second.hra_u.a", *(f"{path}.bias" for path in trained)}
    ours = {f"{path}.bias": plain.get_submodule(path).bias for path in ("first", "norm", "second", "head")}
    ours |= {f"{path}.bias": model.get_submodule(path).bias.detach() for path in trained}
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["a"], x, **ours))
    hra_fx.set_adapter(model, "b")
    assert_close(model(x), oracle(plain, model, ["b"], x, **{"first.bias": model.first.bias.detach()}))
    assert not torch.equal(model.first.bias, plain.first.bias)


@pytest.mark.parametrize("reference", ["b", []], ids=str)
def test_a_backward_after_another_adapter_ran_has_the_gradients_of_its_own_forward(reference: Any) -> None:
    """As in a preference loss, whose reference runs between the forward and the backward of the policy."""
    _, model = adapted(net(), a=config("first", **HEAD, bias="all"), b=config("first", **HEAD))
    x = normal(8, 6)

    def gradients(between: Any) -> dict[str, Tensor]:
        output, parameters = model(x), [*model.named_parameters()]
        hra_fx.set_adapter(model, between)
        assert between == "a" or not torch.allclose(model(x), output, rtol=1e-3)
        hra_fx.set_adapter(model, "a")
        now = model.named_parameters()
        assert [(name, id(p)) for name, p in now] == [(name, id(p)) for name, p in parameters], "in this order"
        output.square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    wanted, found = gradients("a"), gradients(reference)
    assert {"first.hra_u.a", "head.weight", "head.bias", "norm.bias"} <= wanted.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


@pytest.mark.parametrize("switched", ["b", "c", []], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a parent"])
def test_what_goes_by_position_is_the_same_tensor_whichever_copies_are_in_use(switched: Any, inside: bool) -> None:
    """As for averages of weights and states of optimizers. `b` has other copies than `a` and `c`."""
    _, model = adapted(net(), a=config("first", **HEAD), b=config("first", bias="all"), c=config("second", **SAVED))
    turn(model)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    whole = nn.ModuleDict({"inner": model}) if inside else model

    def tensors() -> list[Any]:
        return [
            [*map(id, found)]
            for found in (model.parameters(), model.buffers(), whole.state_dict(keep_vars=True).values())
        ]

    before = tensors()
    hra_fx.set_adapter(model, switched)
    assert tensors() == before
    for _ in range(2):
        average.update_parameters(model)
    for name in ("a", "b", "c", []):
        for each in (model, average.module):
            hra_fx.set_adapter(each, name)
        assert_close(average.module(normal(4, 6)), model(normal(4, 6)))


def test_the_buffers_of_a_norm_switch_with_it() -> None:
    saved = {"modules_to_save": ["norm"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("first", **saved))
    model.train()
    means = {}
    for name, seed in (("a", 1), ("b", 2)):
        hra_fx.set_adapter(model, name)
        model(normal(16, 6, seed=seed) + seed)
        means[name] = model.norm.running_mean.clone()
        assert int(model.norm.num_batches_tracked) == 1
    assert not torch.equal(means["a"], means["b"])
    hra_fx.set_adapter(model, "a")
    assert torch.equal(model.norm.running_mean, means["a"])
    hra_fx.set_adapter(model, [])
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 0


def test_a_buffer_that_no_state_has_is_not_in_files(tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = net()
        model.norm.register_buffer("table", torch.ones(3), persistent=False)
        return model

    model, x = adapted(base(), a=config("first", modules_to_save=["norm"]))[1], normal(4, 6)
    hra_fx.save_adapter(model, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in (*model.state_dict(), *saved, *hra_fx.convert_to_lora(model)[1]) if "table" in key]
    for into in (base(), model):
        assert_close(hra_fx.load_adapter(into, tmp_path, "a")(x), model(x))


def test_a_saved_lstm_runs_on_its_copies() -> None:
    """An LSTM has a list of its weights besides its parameters."""
    base = nn.Sequential(nn.Linear(6, 8), nn.LSTM(8, 5)).double()
    plain, model = adapted(base, a=config("0", modules_to_save=["1"]), b=config("0"))
    x = normal(4, 2, 6)
    lstm = {f"1.{name}": weight.detach() for name, weight in model[1].named_parameters() if "." not in name}
    assert_close(model(x)[0], oracle(plain, model, ["a"], x, **lstm)[0])
    hra_fx.set_adapter(model, "b")
    assert_close(model(x)[0], oracle(plain, model, ["b"], x)[0])


class Twice(nn.Module):
    """One head with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.head(self.body(x))))


@pytest.mark.parametrize("names", [["again"], ["head", "again"]])
def test_a_shared_module_is_copied_once(names: list[str]) -> None:
    plain, model = adapted(Twice().double(), a=config("body", modules_to_save=names), b=config("body"))
    assert model.head is model.again
    x = normal(4, 6)
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    # A copy, because functional_call does not restore a module that has two names.
    assert_close(model(x), oracle(copy.deepcopy(plain), model, ["a"], x, **head))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 6 + 6 * 6 + 6
    hra_fx.set_adapter(model, "b")
    assert_close(model(x), oracle(plain, model, ["b"], x))


def test_a_container_that_owns_a_parameter_is_not_copied_and_a_copy_that_is_not_finite_is_not_folded() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8)))
    model[1].gain = nn.Parameter(torch.ones(8))
    text = r"^1 \(Sequential\): it is a container with its own tensors \(gain\), which cannot be copied\. Name other"
    with refuses(model, text, hra_fx.UnsupportedLayerError):
        hra_fx.transform(model, config("0", modules_to_save=["1"]))
    _, model = adapted(net(), a=config("second", **HEAD))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with refuses(model, r"^head: its trained copy is not finite", hra_fx.FoldError):
        hra_fx.fold(model)


# ---- which parameters are trained ----


BIASES = {f"{path}.bias" for path in ("first", "norm", "second", "head")}
#: Fields, and what is trained beside the vectors.
SETTINGS: list[tuple[dict[str, Any], set[str]]] = [
    ({"bias": "all"}, BIASES),
    ({"bias": "hra_only"}, {"first.bias", "second.bias"}),
    ({"modules_to_save": ["head", "norm"], "bias": "all"}, {*BIASES, "head.weight", "norm.weight"}),
]


def trained(model: nn.Module) -> set[str]:
    return {name for name, flag in flags(model).items() if flag}


@pytest.mark.parametrize(("fields", "others"), SETTINGS)
@pytest.mark.parametrize("inference", [False, True])
def test_which_parameters_are_trained_and_a_fold_restores_all_flags(
    fields: dict[str, Any], others: set[str], inference: bool
) -> None:
    model = net()
    model.norm.weight.requires_grad_(False)
    model.first.weight.requires_grad_(False)
    before = flags(model)
    hra_fx.transform(model, config("first", "second", inference_mode=inference, **fields))
    assert trained(model) == (set() if inference else {"first.hra_u.default", "second.hra_u.default", *others})
    if not inference:
        model(normal(4, 6)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained(model)
    twin = copy.deepcopy(model)
    assert flags(hra_fx.fold(model)) == flags(hra_fx.fold(twin)) == before


# ---- the state_dict of a model with several adapters contains all of its state ----


@pytest.mark.parametrize("theirs", ["a", "b", "disabled"], ids=str)
@pytest.mark.parametrize("ours", ["a", []], ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a parent"])
def test_a_state_loads_correctly_whichever_adapters_copies_were_in_place(ours: Any, theirs: Any, inside: bool) -> None:
    (plain, model), (_, other) = (
        adapted(net(), a=config("first", **HEAD, bias="all"), b=config("second", **HEAD, bias="all")) for _ in range(2)
    )
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


def test_only_the_copies_of_adapters_that_both_have_are_loaded() -> None:
    """Also from the checkpoint of one adapter, which has no entry for the copies that were in place."""
    plain, model = adapted(net(), a=config("first", **SAVED), b=config("second", **SAVED))
    turn(model, seed=5)
    state = {key: value.clone() for key, value in model.state_dict().items() if ".b" in key}
    assert "head.hra_saved.b.weight" in state and "head.weight" not in state
    _, other = adapted(net(), a=config("first", **SAVED), b=config("second", **SAVED))
    hra_fx.set_adapter(other, "b")
    other.load_state_dict(state, strict=False)
    hra_fx.set_adapter(model, "b")
    x = normal(4, 6)
    assert torch.equal(other(x), model(x))
    other = hra_fx.transform(net(), config("first", **SAVED), "a")
    loaded = other.load_state_dict(model.state_dict(), strict=False)
    assert "second.hra_u.b" in loaded.unexpected_keys
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
    side = "state_dict" if state == "merged" else "model"
    text = rf"^adapters are merged in the {side} only\. Call hra_fx\.merge_adapter or hra_fx\.unmerge_adapter first\.$"
    values, x = {key: value.clone() for key, value in other.state_dict().items()}, normal(4, 6)
    wanted = other(x)
    with pytest.raises(hra_fx.AdapterError, match=text):
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
    saved = {"modules_to_save": ["head", "norm"]}
    model = adapted(net(), a=config("first"), b=config("second", **saved), c=config("second", bias="all"))[1]
    hra_fx.set_adapter(model, ["b", "a"])
    hra_fx.set_scale(model, "a", 0.5)
    hra_fx.merge_adapter(model)
    model.float()
    floating = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    wanted = model(normal(4, 6).float())
    hra_fx.unmerge_adapter(model)
    assert_close(model(normal(4, 6).float()), wanted, 1e-5)
