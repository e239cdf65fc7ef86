"""What users of PEFT do with a small model of their own: forward, train, switch, save and load, copy and pickle."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.peft_parity.custom import CASES, MLP, Case, dense, mlp, randomised
from integrations.peft_parity.sides import opened_by_peft
from oracles import relative_error
from torch import nn

import hra_fx

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def train(model: nn.Module, case: Case, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        (model(case.x(step + 10)) ** 2).mean().backward()
        optimizer.step()


@cases
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_forward(case: Case, dtype: torch.dtype) -> None:
    model, x = case.model(dtype), case.x(dtype=dtype)
    output = model(x)
    assert output.dtype is dtype
    assert relative_error(output, dense(case.base(dtype), model, x)) < PRECISION[dtype]


@cases
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_the_start_is_the_base_model(case: Case, dtype: torch.dtype) -> None:
    fields = case.fields | {"init_weights": True}
    model = hra_fx.HRAModel(case.base(dtype), hra_fx.HRAConfig(**fields))
    assert relative_error(model(case.x(dtype=dtype)), case.base(dtype)(case.x(dtype=dtype))) < PRECISION[dtype]


@cases
def test_only_what_is_trained_changes_and_all_of_it_does(case: Case) -> None:
    model = case.model()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    train(model, case)
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert (not torch.equal(parameter, value)) is flag, name
        assert (parameter.grad is not None) is flag, name
    assert any("hra_u" in name for name, (flag, _) in before.items() if flag)
    assert relative_error(model(case.x()), dense(case.base(), model, case.x())) < 1e-5


@cases
def test_disabled_after_training(case: Case) -> None:
    model = case.model()
    train(model, case)
    wanted, base = dense(case.base(), model, case.x()), case.base()(case.x())
    with model.disable_adapter():
        assert torch.equal(model(case.x()), base)
    assert relative_error(model(case.x()), wanted) < 1e-5
    model.disable_adapter_layers()
    assert torch.equal(model(case.x()), base)
    model.enable_adapter_layers()
    assert relative_error(model(case.x()), wanted) < 1e-5
    assert relative_error(model(case.x()), base) > 1e-3


def test_an_error_inside_the_disable_block_leaves_it() -> None:
    case = CASES["both"]
    model = case.model()
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        raise RuntimeError("mine")
    assert relative_error(model(case.x()), dense(case.base(), model, case.x())) < 1e-5


@cases
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_saved_and_loaded(case: Case, low: bool, is_trainable: bool, tmp_path: Path) -> None:
    model = case.model()
    train(model, case)
    model.save_pretrained(tmp_path)
    again = hra_fx.HRAModel.from_pretrained(
        case.base(), tmp_path, "default", is_trainable=is_trainable, low_cpu_mem_usage=low, torch_device="cpu"
    )
    assert not any(tensor.is_meta for tensor in again.state_dict().values())
    assert torch.equal(again(case.x()), model(case.x()))
    assert relative_error(opened_by_peft(case.base(), tmp_path)(case.x()), model(case.x())) < 1e-5
    assert any(p.requires_grad for p in again.parameters()) is is_trainable


def test_from_pretrained_goes_by_the_configuration_that_it_is_given(tmp_path: Path) -> None:
    """As PEFT's does: `config=` is used instead of the folder's."""
    case = mlp(target_modules=["lin0", "lin1"], init_weights=False)
    case.model().save_pretrained(tmp_path)
    theirs, ours = (kind.HRAConfig.from_pretrained(tmp_path) for kind in (peft, hra_fx))
    theirs.apply_GS = ours.apply_GS = True
    judge = opened_by_peft(case.base(), tmp_path, config=theirs)
    model = hra_fx.HRAModel.from_pretrained(case.base(), tmp_path, config=ours)
    assert relative_error(model(case.x()), judge(case.x())) < 1e-5


def test_a_model_made_on_meta_and_filled() -> None:
    case = CASES["both"]
    model = case.model()
    empty = hra_fx.HRAModel(case.base(), hra_fx.HRAConfig(**case.fields), low_cpu_mem_usage=True)
    meta = {name for name, tensor in empty.state_dict().items() if tensor.is_meta}
    assert meta == {"lin0.hra_u.default", "lin1.hra_u.default"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(case.x()), model(case.x()))


OTHERS: dict[str, dict[str, Any]] = {
    "same": {"r": 4, "target_modules": ["lin0"]},
    "another layer": {"r": 3, "target_modules": ["lin1"]},
    "both layers": {"r": 2, "target_modules": ["lin0", "lin1"], "init_weights": False},
    "GS": {"r": 3, "apply_GS": True, "target_modules": ["lin0", "lin1"]},
    "saved": {"r": 2, "target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}
others = pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
FIRST = CASES["lin0 in a list"]


def two(other: dict[str, Any]) -> Any:
    model = FIRST.model()
    model.add_adapter("other", hra_fx.HRAConfig(**other))
    return randomised(model, "other", 7)


@others
def test_a_second_adapter_and_switching(other: dict[str, Any]) -> None:
    model, x = two(other), FIRST.x()
    for name in ("default", "other", "default"):
        if model.active_adapter != name:
            model.set_adapter(name)
        assert relative_error(model(x), dense(FIRST.base(), model, x, [name])) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), FIRST.base()(x))


@others
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"]], ids=str)
def test_both_at_once(other: dict[str, Any], order: list[str]) -> None:
    model, x = two(other), FIRST.x()
    model.set_adapter(order)
    assert model.active_adapters == order
    assert relative_error(model(x), dense(FIRST.base(), model, x, order)) < 1e-5


@others
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("gone", ["default", "other"])
def test_deleting(other: dict[str, Any], active: str, gone: str) -> None:
    model, x = two(other), FIRST.x()
    model.set_adapter(active)
    left = ({"default", "other"} - {gone}).pop()
    if gone == active:
        with pytest.warns(hra_fx.HRAWarning, match=f"{left!r} is active now"):
            model.delete_adapter(gone)
    else:
        model.delete_adapter(gone)
    assert list(model.peft_config) == model.active_adapters == [left]
    assert not any(key.endswith(f".{gone}") or f".{gone}." in key for key in model.state_dict())
    assert relative_error(model(x), dense(FIRST.base(), model, x, [left])) < 1e-5


def test_names_that_are_not_there() -> None:
    model = two(OTHERS["same"])
    for step in (model.delete_adapter, model.set_adapter):
        with pytest.raises(ValueError, match="the model has no such adapter"):
            step("absent")
    with pytest.raises(ValueError, match="exists already"):
        model.add_adapter("other", hra_fx.HRAConfig(target_modules=["lin0"]))


@others
def test_the_other_adapter_stays_while_one_is_trained(other: dict[str, Any]) -> None:
    model = two(other)
    for name in ("other", "default"):
        model.set_adapter(name)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, FIRST)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(n.endswith(f".{name}") or (name == "other" and n.startswith("lin1.")) for n in changed)


@others
def test_two_adapters_saved_and_loaded_twice(other: dict[str, Any], tmp_path: Path) -> None:
    model, x = two(other), FIRST.x()
    model.save_pretrained(tmp_path)
    again = hra_fx.HRAModel.from_pretrained(FIRST.base(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    again.load_adapter(tmp_path / "other", "third")
    assert again.active_adapter == "default"
    for name, same in (("default", "default"), ("other", "other"), ("third", "other")):
        again.set_adapter(name)
        model.set_adapter(same)
        assert torch.equal(again(x), model(x))
    judge = opened_by_peft(FIRST.base(), tmp_path / "other")
    assert relative_error(again(x), judge(x)) < 1e-5


@others
@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_pickles(other: dict[str, Any], active: str, how: str) -> None:
    model, x = two(other), FIRST.x()
    model.set_adapter(active)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert isinstance(twin, (hra_fx.HRAModel, MLP))
    assert type(twin) is type(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    for name in ("default", "other", active):
        for each in (model, twin):
            each.set_adapter(name)
        assert torch.equal(twin(x), model(x))
    wanted = model(x)
    train(twin, FIRST)
    assert torch.equal(model(x), wanted)
    assert not torch.equal(twin(x), wanted)


def test_repr_names_adapters_and_layers_as_such() -> None:
    text = repr(two(OTHERS["both layers"]))
    assert "MLP" in text
    assert "default" in text
    assert "other" in text
    assert "hra" in text.lower()


@cases
def test_dtypes_and_devices_move_with_the_model(case: Case) -> None:
    model = case.model()
    assert {tensor.device.type for tensor in copy.deepcopy(model).to("meta").state_dict().values()} == {"meta"}
    double = copy.deepcopy(model).to("cpu").to(torch.float64)
    assert {tensor.dtype for tensor in double.state_dict().values()} == {torch.float64}
    x = case.x(dtype=torch.float64)
    assert relative_error(double(x), dense(case.base(), model, x)) < 1e-12


def test_dropout_follows_the_mode() -> None:
    case = CASES["both"]
    model = case.model()
    torch.manual_seed(5)
    drawn = [model.train()(case.x()) for _ in range(2)]
    assert not torch.equal(*drawn)
    kept = [model.eval()(case.x()) for _ in range(2)]
    assert torch.equal(*kept)
    torch.manual_seed(5)
    assert torch.equal(model.train()(case.x()), drawn[0])


def test_an_unknown_target_is_a_value_error_as_in_peft() -> None:
    for make, config in ((hra_fx.HRAModel, hra_fx.HRAConfig), (peft.get_peft_model, peft.HRAConfig)):
        with pytest.raises(ValueError, match="absent"):
            make(mlp().base(), config(target_modules=["absent"]))


def test_a_gradient_comes_to_the_input_and_to_the_layers_before() -> None:
    case = CASES["lin1"]
    model, x = case.model(), case.x().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    base = dense(case.base(), model, case.x())
    assert relative_error(model(x), base) < 1e-5
