"""Methods of `HRAModel` with PEFT's options: merge, unload, load with another configuration, unknown names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft_sides import F64, Net, by_us, net, opened_by_peft, randomise, tokens

import hra_fx

FIELDS: dict[str, dict[str, Any]] = {
    "odd rank": {"r": 3, "target_modules": ["query", "value"]},
    "convolution, Gram-Schmidt": {"r": 2, "target_modules": ["conv", "out"], "apply_GS": True},
    "trained modules and biases": {
        "r": 2,
        "target_modules": ["query"],
        "modules_to_save": ["head"],
        "bias": "hra_only",
    },
}


def randomised(**fields: Any) -> Any:
    model = by_us(net(F64), **fields)
    randomise(model)
    return model


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_an_adapter_is_merged_unmerged_and_unloaded(fields: dict[str, Any]) -> None:
    model, base, x = randomised(**fields), net(F64), tokens()
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    assert relative_error(wanted, base(x)) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert relative_error(model(x), wanted) < 1e-12
        # The weights from before are kept, so that they come back bit for bit.
        assert [key for key in model.state_dict() if not key.endswith("hra_u.unmerged")] == list(state)
        assert any(not torch.equal(model.state_dict()[key], value) for key, value in state.items())
        model.unmerge_adapter()
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    unmerged = copy.deepcopy(model)
    model.merge_adapter()
    for plain, output in (
        (unmerged.merge_and_unload(safe_merge=True, progressbar=False), wanted),
        (copy.deepcopy(model).merge_and_unload(), wanted),
        (model.unload(), base(x)),
    ):
        assert type(plain) is Net
        assert list(plain.state_dict()) == list(base.state_dict())
        assert relative_error(plain(x), output) < 1e-12
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.state_dict().items())


def test_a_named_adapter_is_merged_and_unloaded() -> None:
    model, x = randomised(**FIELDS["odd rank"]), tokens()
    model.add_adapter("other", hra_fx.HRAConfig(r=3, target_modules=["out"], init_weights=False))
    model.set_adapter("other")
    wanted = model(x)
    model.set_adapter("default")
    with pytest.warns(hra_fx.HRAWarning, match="default"):
        plain = model.merge_and_unload(adapter_names=["other"])
    assert relative_error(plain(x), wanted) < 1e-12
    assert list(plain.state_dict()) == list(net().state_dict())


def test_from_pretrained_uses_the_given_configuration(tmp_path: Path) -> None:
    """As in PEFT: `config=` is used instead of the folder's."""
    randomised(**FIELDS["odd rank"], init_weights=False).save_pretrained(tmp_path)
    theirs, ours = (kind.HRAConfig.from_pretrained(tmp_path) for kind in (peft, hra_fx))
    theirs.apply_GS = ours.apply_GS = True
    opened = opened_by_peft(net(F64), tmp_path, config=theirs)
    model = hra_fx.HRAModel.from_pretrained(net(F64), tmp_path, config=ours)
    assert relative_error(model(tokens()), opened(tokens())) < 1e-5


def test_a_model_made_on_meta_and_filled() -> None:
    model = randomised(r=4, target_modules=["query"])
    empty = hra_fx.HRAModel(net(F64), hra_fx.HRAConfig(r=4, target_modules=["query"]), low_cpu_mem_usage=True)
    meta = {name for name, tensor in empty.state_dict().items() if tensor.is_meta}
    assert meta == {f"body.layers.{i}.query.hra_u.default" for i in range(3)}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tokens()), model(tokens()))


def test_unknown_names_are_value_errors_as_in_peft() -> None:
    for make, config in ((hra_fx.HRAModel, hra_fx.HRAConfig), (peft.get_peft_model, peft.HRAConfig)):
        with pytest.raises(ValueError, match="absent"):
            make(net(), config(target_modules=["absent"]))
    model = randomised(**FIELDS["odd rank"])
    for step in (model.delete_adapter, model.set_adapter):
        with pytest.raises(ValueError, match=r"^the model has no adapter 'absent'\. It has 'default'\.$"):
            step("absent")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", hra_fx.HRAConfig(target_modules=["query"]))
