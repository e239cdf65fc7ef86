"""Merging, unmerging and taking off, on small models, with the dense weights as the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integrations.peft_parity.custom import CASES, Case, dense, randomised
from integrations.peft_parity.sides import by_peft, peft_warnings_ignored
from oracles import relative_error
from torch import Tensor

import hra_fx

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FIRST = CASES["lin0 in a list"]


def two(**other: Any) -> Any:
    model = FIRST.model()
    model.add_adapter("other", hra_fx.HRAConfig(**({"r": 3, "target_modules": ["lin0", "lin1"]} | other)))
    return randomised(model, "other", 7)


def base_weights(case: Case, model: Any) -> dict[str, Tensor]:
    """The base model's own entries of the model's state."""
    own = case.base().state_dict().keys()
    return {key: value.clone() for key, value in model.state_dict().items() if key in own}


@cases
def test_merge_and_unmerge(case: Case) -> None:
    model, x = case.model(), case.x()
    wanted, before = dense(case.base(), model, x), base_weights(case, model)
    keys = list(model.state_dict())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert relative_error(model(x), wanted) < 1e-5
        # The weights that come back are kept beside, so that they come back bit for bit.
        assert [key for key in model.state_dict() if not key.endswith("hra_u.unmerged")] == keys
        assert any(not torch.equal(value, before[key]) for key, value in base_weights(case, model).items())
        model.unmerge_adapter()
        assert list(model.state_dict()) == keys
        assert all(torch.equal(value, before[key]) for key, value in base_weights(case, model).items())
        assert relative_error(model(x), wanted) < 1e-5


@cases
@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_and_unload(case: Case, merged_before: bool) -> None:
    for merge in (False, True):
        model, x = case.model(), case.x()
        wanted = dense(case.base(), model, x) if merge else case.base()(x)
        if merged_before:
            model.merge_adapter()
        plain = model.merge_and_unload(safe_merge=True, progressbar=False) if merge else model.unload()
        assert type(plain) is case.kind
        assert list(plain.state_dict()) == list(case.base().state_dict())
        assert relative_error(plain(x), wanted) < 1e-5
        assert merge or all(torch.equal(plain.state_dict()[k], v) for k, v in case.base().state_dict().items())


def test_merging_the_first_of_two_active_ones() -> None:
    """PEFT then leaves the second out of the forward; here both act."""
    model, x = two(), FIRST.x()
    model.set_adapter(["default", "other"])
    wanted = dense(FIRST.base(), model, x, ["default", "other"])
    model.merge_adapter(["default"])
    assert relative_error(model(x), wanted) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model(x), wanted) < 1e-5


def test_merge_and_unload_of_a_named_adapter() -> None:
    model, x = two(), FIRST.x()
    wanted = dense(FIRST.base(), model, x, ["other"])
    with pytest.warns(hra_fx.HRAWarning, match="default"):
        plain = model.merge_and_unload(adapter_names=["other"])
    assert relative_error(plain(x), wanted) < 1e-5
    assert list(plain.state_dict()) == list(FIRST.base().state_dict())


@pytest.mark.parametrize("name", ["lin0", "both", "odd", "GS", "saved", "conv0", "convs"])
def test_merged_weights_are_those_of_peft(name: str) -> None:
    case = CASES[name]
    fields = case.fields | {"init_weights": False, "modules_to_save": None}
    theirs = by_peft(case.base(torch.float64), **fields)
    ours = hra_fx.HRAModel(case.base(torch.float64), hra_fx.HRAConfig(**fields))
    randomised(ours, "default", 3)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if ".hra_u." in key:
                theirs.get_parameter(f"base_model.model.{key}").copy_(parameter)
    for model in (theirs, ours):
        model.merge_adapter()
    assert relative_error(ours(case.x(dtype=torch.float64)), theirs(case.x(dtype=torch.float64))) < 1e-12
    plain = ours.merge_and_unload()
    with peft_warnings_ignored():
        judge = theirs.merge_and_unload()
    for key, value in judge.state_dict().items():
        assert relative_error(plain.state_dict()[key], value) < 1e-12, key
