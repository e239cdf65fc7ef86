"""What users of PEFT do with a small model of their own: forward, train, switch, save and load, copy and pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integrations.peft_parity.custom import CASES, Case, dense, mlp, randomised
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
def test_forward_and_start(case: Case) -> None:
    """Random vectors rotate the weights; with `init_weights=True` the model starts as the base model."""
    for dtype, bound in PRECISION.items():
        model, x = case.model(dtype), case.x(dtype=dtype)
        output = model(x)
        assert output.dtype is dtype
        assert relative_error(output, dense(case.base(dtype), model, x)) < bound
        config = hra_fx.HRAConfig(**(case.fields | {"init_weights": True}))
        assert relative_error(hra_fx.HRAModel(case.base(dtype), config)(x), case.base(dtype)(x)) < bound


@cases
def test_training_changes_what_is_trained_and_can_be_disabled(case: Case) -> None:
    model = case.model()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    train(model, case)
    for name, parameter in model.named_parameters():
        flag, value = before[name]
        assert (not torch.equal(parameter, value)) is flag, name
        assert (parameter.grad is not None) is flag, name
    assert any("hra_u" in name for name, (flag, _) in before.items() if flag)
    wanted, base = dense(case.base(), model, case.x()), case.base()(case.x())
    assert relative_error(model(case.x()), wanted) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(case.x()), base)
    model.disable_adapter_layers()
    assert torch.equal(model(case.x()), base)
    model.enable_adapter_layers()
    assert relative_error(model(case.x()), wanted) < 1e-5
    assert relative_error(model(case.x()), base) > 1e-3


@cases
@pytest.mark.parametrize(("low", "is_trainable"), [(False, True), (True, False)])
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
def test_switching_to_one_to_both_and_to_none(other: dict[str, Any]) -> None:
    model, x = two(other), FIRST.x()
    for names in (["default"], ["other"], ["default", "other"], ["other", "default"], ["default"]):
        model.set_adapter(names)
        assert model.active_adapters == names
        assert relative_error(model(x), dense(FIRST.base(), model, x, names)) < 1e-5
    with model.disable_adapter():
        assert torch.equal(model(x), FIRST.base()(x))


def test_names_that_are_not_there() -> None:
    model = two(OTHERS["same"])
    for step in (model.delete_adapter, model.set_adapter):
        with pytest.raises(ValueError, match="the model has no such adapter"):
            step("absent")
    with pytest.raises(ValueError, match="exists already"):
        model.add_adapter("other", hra_fx.HRAConfig(target_modules=["lin0"]))


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


def test_an_unknown_target_is_a_value_error_as_in_peft() -> None:
    for make, config in ((hra_fx.HRAModel, hra_fx.HRAConfig), (peft.get_peft_model, peft.HRAConfig)):
        with pytest.raises(ValueError, match="absent"):
            make(mlp().base(), config(target_modules=["absent"]))
