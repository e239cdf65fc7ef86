"""PEFT's functions under their names: `get_peft_model`, switching, deleting, the auto classes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from oracles import relative_error
from peft_sides import F64, by_peft, net, opened_by_peft, pair, peft_warnings_ignored, randomise, same_line, tokens

import hra_fx

FIELDS: dict[str, dict[str, Any]] = {
    "even rank": {"r": 4, "target_modules": ["query", "value"]},
    "trained modules": {"r": 2, "target_modules": ["query"], "modules_to_save": ["head", "classifier"]},
    "convolution": {"r": 2, "target_modules": ["conv", "out"], "layers_to_transform": None},
}


def test_a_configuration_of_peft_is_converted_and_not_changed() -> None:
    fields = FIELDS["trained modules"] | {"bias": "hra_only"}
    for add in (hra_fx.transform, hra_fx.get_peft_model):
        config = peft.HRAConfig(**copy.deepcopy(fields))
        ours = add(net(F64), config)
        assert ours._hra_record.configs["default"] == hra_fx.HRAConfig(**fields, peft_version=peft.__version__)
        assert config == peft.HRAConfig(**copy.deepcopy(fields))
    same_line(by_peft(net(F64), **fields), ours)
    hra_fx.add_adapter(ours, "other", peft.HRAConfig(r=2, target_modules=["out"]))
    assert list(ours.peft_config) == ["default", "other"]
    model = hra_fx.get_peft_model(net(), config, "mine", revision="v2", low_cpu_mem_usage=True)
    assert model.peft_config["mine"].revision == "v2" and config.revision is None
    assert all(vectors.is_meta for name, vectors in model.named_parameters() if name.endswith(".hra_u.mine"))


def test_peft_refuses_our_configuration_with_what_to_call() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["query"])
    assert not hasattr(config, "is_prompt_learning")
    text = r"^hra_fx\.HRAConfig is not a peft\.PeftConfig\. Call the function of hra_fx with the same name, such as "
    with pytest.raises(AttributeError, match=text):
        peft.get_peft_model(net(), config)
    with pytest.raises(AttributeError, match=text):
        peft.get_peft_model_state_dict(hra_fx.get_peft_model(net(), config))
    model = peft.get_peft_model(net(), peft.HRAConfig.from_peft_type(**config.to_dict()))
    assert model.peft_config["default"].r == 2


def test_hotswap_replaces_the_values_in_place(tmp_path: Path) -> None:
    first, second = (hra_fx.get_peft_model(net(F64), hra_fx.HRAConfig(**FIELDS["even rank"])) for _ in range(2))
    randomise(first)
    first.save_pretrained(tmp_path)
    vectors = second.body.layers[0].query.hra_u["default"]
    second.load_adapter(tmp_path, "default", hotswap=True)
    assert second.body.layers[0].query.hra_u["default"] is vectors
    assert relative_error(second(tokens()), first(tokens())) < 1e-12


# Which adapters act and are trained


#: What PEFT and hra_fx put into the names of the base model's tensors.
ADDED = re.compile(r"^base_model\.model\.|\.base_layer|\.original_module|\.(modules_to_save|hra_saved)\.\w+")


def flags(model: Any) -> set[str]:
    """The names in the base model of all that is trained; names of vectors end in that of their adapter."""
    return {ADDED.sub("", name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def same_flags(theirs: Any, ours: Any) -> set[str]:
    """The adapters that are trained; which parameters those are, and how many, is as in PEFT."""
    assert flags(ours) == flags(theirs)
    same_line(theirs, ours)
    return {name.rpartition(".hra_u.")[2] for name in flags(ours) if ".hra_u." in name}


CHANGES: dict[str, Any] = {
    "new": lambda model: None,
    "other": lambda model: model.set_adapter("other"),
    "both": lambda model: tuner(model).set_adapter(["other", "default"]),
    "in inference mode": lambda model: model.set_adapter("other", inference_mode=True),
    "trained again": lambda model: (CHANGES["in inference mode"](model), model.set_adapter("default")),
    "disabled": lambda model: tuner(model).disable_adapter_layers(),
    "disabled, then set": lambda model: (CHANGES["disabled"](model), model.set_adapter("other")),
    "enabled again": lambda model: (CHANGES["disabled, then set"](model), tuner(model).enable_adapter_layers()),
}


def tuner(model: Any) -> Any:
    return model.base_model if isinstance(model, peft.PeftModel) else model


@pytest.mark.needs("peft>=0.21")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["even rank", "trained modules", "convolution"])
def test_a_switch_acts_on_the_same_parameters_as_in_peft(case: str, change: str) -> None:
    theirs, ours = pair(FIELDS[case], {"r": 2, "target_modules": ["query", "value"]})
    for model in (theirs, ours):
        CHANGES[change](model)
    if not change.startswith("disabled"):  # PEFT freezes them until they are enabled
        same_flags(theirs, ours)
    assert ours.active_adapters == (theirs.base_model if change == "both" else theirs).active_adapters
    assert relative_error(ours(tokens()), theirs(tokens())) < 1e-5


@pytest.mark.needs("peft>=0.21")
@pytest.mark.parametrize("is_trainable", [False, True])
def test_what_is_trained_of_loaded_and_after_deleted_adapters(is_trainable: bool, tmp_path: Path) -> None:
    """Loading for inference puts the model into eval mode. PEFT also trains a second loaded adapter, which does not
    act; and it forgets the head of the adapter that is left, until it is set once more."""
    for name, case in (("first", "trained modules"), ("second", "convolution")):
        model = by_peft(net(), **FIELDS[case])
        with peft_warnings_ignored():
            model.save_pretrained(tmp_path / name)
    theirs = opened_by_peft(net().train(), tmp_path / "first", is_trainable=is_trainable)
    ours = hra_fx.HRAModel.from_pretrained(net().train(), tmp_path / "first", is_trainable=is_trainable)
    assert ours.training is ours.body.layers[0].training is theirs.training is is_trainable
    assert same_flags(theirs, ours) == ({"default"} if is_trainable else set())
    for model in (theirs, ours):
        model.train()
        model.set_adapter("default")
        with peft_warnings_ignored():
            model.load_adapter(tmp_path / "second", "other", is_trainable=is_trainable)
    assert ours.training is theirs.training is is_trainable
    assert {name.rpartition(".hra_u.")[2] for name in flags(ours) if ".hra_u." in name} == {"default"}
    assert is_trainable or same_flags(theirs, ours) == {"default"}
    for name in ("other", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert same_flags(theirs, ours) == {name}
    for model in (theirs, ours):
        with peft_warnings_ignored():
            model.delete_adapter("default" if is_trainable else "other")
    left = "other" if is_trainable else "default"
    assert flags(theirs) <= flags(ours)
    theirs.set_adapter(left)
    assert same_flags(theirs, ours) == {left}
    assert ours.active_adapters == theirs.active_adapters == [left]
