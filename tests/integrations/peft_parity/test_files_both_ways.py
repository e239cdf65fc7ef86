"""An adapter that was written here computes the same in PEFT, and the reverse: every option, task type and target."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft_sides import (
    F32,
    F64,
    TOLERANCE,
    agree,
    by_peft,
    by_us,
    net,
    opened_by_peft,
    peft_warnings_ignored,
    randomise,
    same_line,
    same_tensors,
    saved_by_peft,
    tokens,
    trained,
)
from safetensors.torch import load_file
from tiny_models import inputs, tiny
from torch import Tensor, nn

import hra_fx

LIST = ["query", "value"]
OPTIONS: dict[str, dict[str, Any]] = {
    "r=1": {"r": 1, "init_weights": False},
    "r=7, random": {"r": 7, "init_weights": False},
    "GS, even": {"r": 4, "apply_GS": True, "init_weights": False},
    "all-linear": {"target_modules": "all-linear"},
    "conv": {"target_modules": ["conv"]},
    "conv, GS": {"target_modules": ["conv"], "r": 4, "apply_GS": True, "init_weights": False},
    "conv and linear": {"target_modules": ["conv", "query", "head.0"]},
    "bias all": {"bias": "all"},
    "save all kinds": {"modules_to_save": ["embed", "head", "classifier"]},
    "save head, bias all": {"modules_to_save": ["head"], "bias": "all"},
    "save, bias hra_only": {"modules_to_save": ["head"], "bias": "hra_only"},
    "save empty": {"modules_to_save": []},
    "revision": {"revision": "main"},
}
ANCHORED: dict[str, dict[str, Any]] = {
    "odd": {"r": 3},
    "r=1": {"r": 1},
    "GS": {"r": 2, "apply_GS": True},
    "GS, odd": {"r": 3, "apply_GS": True},
    "conv": {"r": 3, "target_modules": ["conv"]},
    "conv, GS": {"r": 4, "apply_GS": True, "target_modules": ["conv", "out"]},
    "bias": {"r": 3, "bias": "all"},
    "head": {"r": 2, "apply_GS": True, "modules_to_save": ["head", "embed"], "bias": "hra_only"},
}
LOADED = ANCHORED | {name: OPTIONS[name] for name in ("GS, even", "conv and linear", "save head, bias all")}
anchored = pytest.mark.parametrize("fields", ANCHORED.values(), ids=ANCHORED.keys())


def full(fields: dict[str, Any]) -> dict[str, Any]:
    return {"r": 4, "target_modules": LIST} | fields


def moved_statistics(model: nn.Module) -> None:
    """One step of training for BatchNorm: its buffers are no longer the base model's."""
    model.train()
    model(tokens(5))
    model.eval()


def trained_by_us(dtype: torch.dtype, fields: dict[str, Any]) -> Any:
    """A model with random values, and for BatchNorm other buffers than the base model's."""
    model = by_us(net(dtype), **full(fields))
    randomise(model)
    if "head" in (fields.get("modules_to_save") or ()):
        moved_statistics(model)
    return model


def check_same_file(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Keys, dtypes and shapes of the weights, and every field of the configuration."""
    same = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours")]
    for config in same:
        del config["peft_version"]
        for name in ("target_modules", "exclude_modules"):
            config[name] = sorted(config[name]) if isinstance(config[name], list) else config[name]
    assert same[1] == same[0]
    tensors = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours")]
    wanted, got = ({key: (t.dtype, t.shape) for key, t in side.items()} for side in tensors)
    # With bias="all" PEFT writes the biases of a saved module twice more, under names that it never reads.
    doubled = {key for key in wanted if ".original_module." in key or ".modules_to_save." in key}
    assert got == {key: value for key, value in wanted.items() if key not in doubled}
    assert not doubled or (fields["bias"] == "all" and fields["modules_to_save"])


def check_both_ways(
    base: nn.Module, x: Tensor | dict[str, Tensor], fields: dict[str, Any], moved: bool, tmp_path: Path
) -> None:
    """Outputs and gradients agree in both libraries, and the round trip through PEFT changes no bit."""
    ours, theirs = by_us(base, **fields), by_peft(base, **fields)
    for model in (ours, theirs):
        randomise(model)
        if moved:
            moved_statistics(model)
    same_line(theirs, ours)
    ours.save_pretrained(tmp_path / "ours")
    saved_by_peft(theirs, tmp_path / "theirs")
    states = peft.get_peft_model_state_dict(theirs), hra_fx.get_peft_model_state_dict(ours)
    wanted = {key: states[0][key] for key in states[1]}
    torch.testing.assert_close(states[1], wanted, rtol=1e-12, atol=1e-12)
    opened = opened_by_peft(base, tmp_path / "ours", is_trainable=True)
    agree(opened, ours, x, F64)
    again = hra_fx.HRAModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    agree(theirs, again, x, F64)
    saved_by_peft(opened, tmp_path / "opened")
    back = hra_fx.load_adapter(copy.deepcopy(base), tmp_path / "opened", is_trainable=True)
    hra_fx.save_adapter(back, tmp_path / "back")
    same_tensors(tmp_path / "ours", tmp_path / "back")


#: PEFT 0.18 does not write biases.
_BIASES = pytest.mark.needs("peft>=0.21")


@pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, id=name, marks=_BIASES if "bias" in fields else ()) for name, fields in OPTIONS.items()],
)
def test_options_go_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    moved = "head" in (fields.get("modules_to_save") or ())
    check_both_ways(net(F64), tokens(), full(fields), moved, tmp_path)
    check_same_file(tmp_path, fields)


@anchored
def test_anchored_written_here_opened_by_peft(fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT has the anchor as trained vectors too; without Gram-Schmidt, the last vectors are ours."""
    ours = trained_by_us(F64, fields)
    ours.save_pretrained(tmp_path)
    theirs = opened_by_peft(net(F64), tmp_path, is_trainable=True)
    assert relative_error(ours(tokens()), theirs(tokens())) < TOLERANCE[F64]
    assert theirs.peft_config["default"].apply_GS is False
    assert trained(theirs).keys() == trained(ours).keys()
    for model in (theirs, ours):
        (model(tokens()) ** 2).sum().backward()
    for name, parameter in trained(ours).items():
        wanted, got = trained(theirs)[name].grad, parameter.grad
        if "hra_u" in name:
            if fields.get("apply_GS"):
                continue
            assert wanted is not None
            wanted = wanted[:, -parameter.shape[1] :]
        assert wanted is not None and got is not None
        assert relative_error(got, wanted) < 10 * TOLERANCE[F64], name


@pytest.mark.parametrize("fields", LOADED.values(), ids=LOADED.keys())
def test_loaded_here_again_bit_for_bit(fields: dict[str, Any], tmp_path: Path) -> None:
    ours = trained_by_us(F32, fields)
    hra_fx.save_adapter(ours, tmp_path / "a")
    again = hra_fx.load_adapter(net(), tmp_path / "a", is_trainable=True)
    before, after = ours.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert (after[key].dtype, after[key].requires_grad) == (value.dtype, value.requires_grad), key
        assert torch.equal(after[key], value), key
    specs = [[m.hra_u.specs for m in model.modules() if hasattr(m, "hra_u")] for model in (ours, again)]
    assert specs[0] == specs[1] or fields not in ANCHORED.values()  # a file without an anchor has no start
    hra_fx.save_adapter(again, tmp_path / "b")
    same_tensors(tmp_path / "a", tmp_path / "b")
    configs = [(tmp_path / side / "adapter_config.json").read_bytes() for side in ("a", "b")]
    assert configs[0] == configs[1]


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "default targets, bert": ("bert", {}),
    "default targets, t5": ("t5", {}),
    "all-linear, t5": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "classes": ("bert, classes", {"task_type": "SEQ_CLS"}),
    "classes, pooler too": ("bert, classes", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "classes, own biases": ("bert, classes", {"task_type": "SEQ_CLS", "bias": "hra_only"}),
    "classes, llama, all-linear": ("llama, classes", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "tokens": ("bert, tokens", {"task_type": "TOKEN_CLS"}),
    "answers": ("bert, answers", {"task_type": "QUESTION_ANS"}),
    "text": ("llama", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}),
    "text, head saved": ("llama", {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head", "embed_tokens"]}),
}


def sites(model: nn.Module) -> set[str]:
    return {name.partition(".hra_u.")[0] for name in model.state_dict() if ".hra_u." in name}


@pytest.mark.parametrize(
    ("name", "fields"),
    [pytest.param(*task, id=name, marks=_BIASES if "bias" in task[1] else ()) for name, task in TASKS.items()],
)
def test_tasks_go_both_ways(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny(name)
    check_both_ways(base, inputs(base), {"r": 4} | fields, False, tmp_path)


def test_a_configuration_that_peft_wrote_starts_a_new_adapter(tmp_path: Path) -> None:
    """For a task PEFT writes every name that a head may have, and itself takes such a file for a new model."""
    base = tiny("bert, classes")
    saved_by_peft(by_peft(base, r=4, task_type="SEQ_CLS"), tmp_path)
    with peft_warnings_ignored():
        theirs = peft.get_peft_model(tiny("bert, classes"), peft.HRAConfig.from_pretrained(tmp_path))
    assert theirs.peft_config["default"].modules_to_save.count("score") > 0
    ours = hra_fx.transform(base, hra_fx.HRAConfig.from_pretrained(tmp_path))
    assert sites(ours) == {name.removeprefix("base_model.model.") for name in sites(theirs)}


SEVERAL: dict[str, dict[str, Any]] = {
    "default": {"r": 4, "target_modules": ["query", "value"]},
    "french": {"r": 3, "target_modules": ["value", "out"], "init_weights": False},
    "with head": {"r": 2, "target_modules": ["conv"], "modules_to_save": ["head", "classifier"]},
}


def several(make: Any) -> Any:
    """A model with all of `SEVERAL`, each at random values."""
    kind = peft.HRAConfig if make is by_peft else hra_fx.HRAConfig
    model = make(net(F64), **SEVERAL["default"])
    with peft_warnings_ignored():
        for name, fields in list(SEVERAL.items())[1:]:
            model.add_adapter(name, kind(**fields))
        for seed, name in enumerate(SEVERAL):
            model.set_adapter(name)
            randomise(model, seed)
        model.set_adapter("default")
    return model


def folders(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("adapter_*")}


@pytest.mark.needs("peft>=0.21")
def test_files_of_several_adapters_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = several(by_us), several(by_peft)
    ours.save_pretrained(tmp_path / "ours")
    saved_by_peft(theirs, tmp_path / "theirs")
    assert folders(tmp_path / "ours") == folders(tmp_path / "theirs")
    opened = opened_by_peft(net(F64), tmp_path / "ours")
    again = hra_fx.HRAModel.from_pretrained(net(F64), tmp_path / "theirs")
    base = net(F64)(tokens())
    for name in SEVERAL:
        if name != "default":
            opened.load_adapter(tmp_path / "ours" / name, name)
            again.load_adapter(tmp_path / "theirs", name, subfolder=name)
        for one, other in ((ours, opened), (again, theirs)):
            one.set_adapter(name)
            other.set_adapter(name)
            # PEFT runs a layer that the active adapter does not have in float32, whatever the model's dtype.
            assert relative_error(one(tokens()), other(tokens())) < 1e-6, name
            assert relative_error(one(tokens()), base) > 1e-3, name
    for number, selected in enumerate((["french"], ["with head", "default"])):
        ours.save_pretrained(tmp_path / f"ours{number}", selected_adapters=selected)
        saved_by_peft(theirs, tmp_path / f"theirs{number}", selected_adapters=selected)
        assert folders(tmp_path / f"ours{number}") == folders(tmp_path / f"theirs{number}")
