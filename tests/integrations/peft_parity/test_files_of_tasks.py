"""Files of task types, default targets and several adapters, between PEFT's model classes and hra_fx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft_sides import (
    F64,
    agree,
    by_peft,
    by_us,
    net,
    opened_by_peft,
    peft_warnings_ignored,
    plain_name,
    randomise,
    same_line,
    saved_by_peft,
    tokens,
    trained,
)
from tiny_models import MODELS, inputs, tiny
from torch import Tensor, nn

import hra_fx

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "default targets, bert": ("bert", {}),
    "default targets, llama": ("llama", {}),
    "default targets, t5": ("t5", {}),
    "all-linear, bert": ("bert", {"target_modules": "all-linear"}),
    "all-linear, llama": ("llama", {"target_modules": "all-linear"}),
    "all-linear, t5": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "features": ("bert", {"task_type": "FEATURE_EXTRACTION"}),
    "classes": ("bert, classes", {"task_type": "SEQ_CLS"}),
    "classes, all-linear": ("bert, classes", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "classes, pooler too": ("bert, classes", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "classes, biases": ("bert, classes", {"task_type": "SEQ_CLS", "bias": "all"}),
    "classes, own biases": ("bert, classes", {"task_type": "SEQ_CLS", "bias": "hra_only"}),
    "classes, llama": ("llama, classes", {"task_type": "SEQ_CLS"}),
    "classes, llama, all-linear": ("llama, classes", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "tokens": ("bert, tokens", {"task_type": "TOKEN_CLS"}),
    "answers": ("bert, answers", {"task_type": "QUESTION_ANS"}),
    "text": ("llama", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}),
    "text, head saved": ("llama", {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "sequence to sequence": ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    "one layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "one layer of default targets": ("bert", {"layers_to_transform": [0]}),
}
tasks = pytest.mark.parametrize(("name", "fields"), TASKS.values(), ids=TASKS.keys())


def sites(model: nn.Module) -> set[str]:
    return {name.partition(".hra_u.")[0] for name in model.state_dict() if ".hra_u." in name}


def check_same_configuration(name: str, base: nn.Module, tmp_path: Path) -> None:
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    for config in (theirs, ours):
        del config["peft_version"]
        assert config["target_modules"] is not None
        named = hra_fx.HRAConfig(target_modules=config["target_modules"], task_type=config["task_type"])
        # PEFT shortens a long list of names; what counts is which layers they name.
        config["target_modules"] = sorted(sites(hra_fx.transform(tiny(name), named)))
        # PEFT names heads that the model does not have ("score" beside "classifier"), in an order of its own.
        saved = config["modules_to_save"] or []
        config["modules_to_save"] = sorted({n for n in saved if any(p.endswith(n) for p, _ in base.named_modules())})
    assert ours == theirs


@tasks
def test_files_go_both_ways(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    base = tiny(name)
    ours, theirs = by_us(base, r=4, **fields), by_peft(base, r=4, **fields)
    for model in (ours, theirs):
        randomise(model)
    ours.save_pretrained(tmp_path / "ours")
    saved_by_peft(theirs, tmp_path / "theirs")
    same_line(theirs, ours)
    agree(opened_by_peft(base, tmp_path / "ours", is_trainable=True), ours, inputs(base), F64)
    again = hra_fx.HRAModel.from_pretrained(tiny(name), tmp_path / "theirs", is_trainable=True)
    agree(theirs, again, inputs(base), F64)
    check_same_configuration(name, base, tmp_path)


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
    "gs": {"r": 2, "apply_GS": True, "init_weights": False, "target_modules": ["query"], "bias": "none"},
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


def outputs_of_each(model: Any) -> dict[str, Tensor]:
    outputs = {}
    for name in SEVERAL:
        model.set_adapter(name)
        outputs[name] = model(tokens()).detach()
    model.set_adapter("default")
    return outputs


def assert_equal_outputs(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, output in wanted.items():
        # PEFT runs a layer that the active adapter does not have in float32, whatever the model's dtype.
        assert relative_error(got[name], output) < 1e-6, name
    values = list(wanted.values())
    assert all(relative_error(a, b) > 1e-3 for i, a in enumerate(values) for b in values[:i])


def folders(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("adapter_*")}


def test_files_of_several_adapters_go_both_ways(tmp_path: Path) -> None:
    ours, theirs = several(by_us), several(by_peft)
    ours.save_pretrained(tmp_path / "ours")
    saved_by_peft(theirs, tmp_path / "theirs")
    assert folders(tmp_path / "ours") == folders(tmp_path / "theirs")
    opened = opened_by_peft(net(F64), tmp_path / "ours")
    again = hra_fx.HRAModel.from_pretrained(net(F64), tmp_path / "theirs")
    for name in list(SEVERAL)[1:]:
        opened.load_adapter(tmp_path / "ours" / name, name)
        again.load_adapter(tmp_path / "theirs", name, subfolder=name)
    assert_equal_outputs(outputs_of_each(ours), outputs_of_each(opened))
    assert_equal_outputs(outputs_of_each(again), outputs_of_each(theirs))
    for number, selected in enumerate((["french"], ["gs", "default"])):
        ours.save_pretrained(tmp_path / f"ours{number}", selected_adapters=selected)
        saved_by_peft(theirs, tmp_path / f"theirs{number}", selected_adapters=selected)
        assert folders(tmp_path / f"ours{number}") == folders(tmp_path / f"theirs{number}")


def test_a_head_tied_to_the_embedding_counts_once() -> None:
    base = MODELS["llama"]()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    same_line(by_peft(base, r=4), by_us(base, r=4))


@pytest.mark.parametrize("name", ["hra", "ünï"])
def test_the_name_of_an_adapter_is_no_part_of_its_file(name: str, tmp_path: Path) -> None:
    theirs = by_peft(net(F64), name, r=2, target_modules=["query", "conv"], modules_to_save=["classifier"])
    with torch.no_grad():
        for seed, (_, parameter) in enumerate(theirs.named_parameters()):
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    saved_by_peft(theirs, tmp_path)
    assert folders(tmp_path) == {f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors"}
    for chosen in (name, "default", "mine"):
        ours = hra_fx.HRAModel.from_pretrained(net(F64), tmp_path, chosen, subfolder=name)
        assert ours.active_adapter == chosen
        assert relative_error(ours(tokens()), theirs(tokens())) < 1e-9
    wanted = {plain_name(n, name).removesuffix(f".{name}") for n, p in theirs.named_parameters() if p.requires_grad}
    ours.set_adapter("mine")
    assert {n.removesuffix(".mine") for n in trained(ours)} == wanted
    ours.save_pretrained(tmp_path / "again")
    assert folders(tmp_path / "again") == {"mine/adapter_config.json", "mine/adapter_model.safetensors"}
    theirs.load_adapter(tmp_path / "again" / "mine", "back")
    theirs.set_adapter("back")
    assert relative_error(ours(tokens()), theirs(tokens())) < 1e-9
