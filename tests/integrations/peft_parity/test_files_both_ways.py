"""An adapter that was written here computes the same in PEFT, and the reverse: once for each kind of adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_sides import (
    F64,
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
)
from safetensors.torch import load_file
from tiny_models import inputs, tiny
from torch import nn

import hra_fx

LIST = ["query", "value"]
#: Kind of adapter -> the base model (`net` if it is None), and the fields of the configuration.
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "odd rank, random": (None, {"r": 7, "init_weights": False, "target_modules": LIST}),
    "Gram-Schmidt": (None, {"apply_GS": True, "init_weights": False, "target_modules": LIST}),
    "convolution, Gram-Schmidt": (None, {"target_modules": ["conv"], "apply_GS": True, "init_weights": False}),
    "convolution and linear": (None, {"target_modules": ["conv", "query", "head.0"]}),
    "all-linear, a revision": (None, {"target_modules": "all-linear", "revision": "main", "modules_to_save": []}),
    "all biases": (None, {"target_modules": LIST, "bias": "all"}),
    "modules": (None, {"target_modules": LIST, "modules_to_save": ["embed", "head", "classifier"]}),
    "modules and all biases": (None, {"target_modules": LIST, "modules_to_save": ["head"], "bias": "all"}),
    "modules and own biases": (None, {"target_modules": LIST, "modules_to_save": ["head"], "bias": "hra_only"}),
    "default targets": ("t5", {}),
    "SEQ_CLS": ("llama, classes", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "SEQ_CLS, own biases": ("bert, classes", {"task_type": "SEQ_CLS", "bias": "hra_only"}),
    "SEQ_CLS, another module": ("bert, classes", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "SEQ_2_SEQ_LM": ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    "TOKEN_CLS": ("bert, tokens", {"task_type": "TOKEN_CLS"}),
    "QUESTION_ANS": ("bert, answers", {"task_type": "QUESTION_ANS"}),
    "CAUSAL_LM": ("llama", {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head", "embed_tokens"]}),
}


def move(model: nn.Module, fields: dict[str, Any]) -> None:
    """Set random values, and statistics of BatchNorm in saved modules that differ from those of the base model."""
    randomise(model)
    if "head" in (fields.get("modules_to_save") or ()):
        model.train()
        model(tokens(5))
        model.eval()


def check_same_file(theirs: Path, ours: Path, fields: dict[str, Any]) -> None:
    """Keys, dtypes and shapes of the weights, and every field of the configuration."""
    same = [json.loads((side / "adapter_config.json").read_text()) for side in (theirs, ours)]
    for config in same:
        del config["peft_version"]
        for name in ("target_modules", "exclude_modules"):
            config[name] = sorted(config[name]) if isinstance(config[name], list) else config[name]
    assert same[1] == same[0]
    tensors = [load_file(side / "adapter_model.safetensors") for side in (theirs, ours)]
    wanted, got = ({key: (t.dtype, t.shape) for key, t in side.items()} for side in tensors)
    # With bias="all" PEFT writes the biases of a saved module twice more, under names that it never reads.
    doubled = {key for key in wanted if ".original_module." in key or ".modules_to_save." in key}
    assert got == {key: value for key, value in wanted.items() if key not in doubled}
    assert not doubled or (fields["bias"] == "all" and fields["modules_to_save"])


#: PEFT 0.18 does not write biases.
_BIASES = pytest.mark.needs("peft>=0.21")


@pytest.mark.parametrize(
    ("name", "fields"),
    [pytest.param(*kind, id=id, marks=_BIASES if "bias" in kind[1] else ()) for id, kind in KINDS.items()],
)
def test_files_go_both_ways(name: str | None, fields: dict[str, Any], tmp_path: Path) -> None:
    """Outputs and gradients agree in both libraries, and the round trip through PEFT only rounds pairs."""
    base, fields = tiny(name) if name else net(F64), {"r": 4} | fields
    x = inputs(base) if name else tokens()
    ours, theirs = by_us(base, **fields), by_peft(base, **fields)
    for model in (ours, theirs):
        move(model, fields)
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
    same_tensors(tmp_path / "ours", tmp_path / "back", 1e-15)
    if name is None:  # for a task, PEFT writes every name that a head may have
        check_same_file(tmp_path / "theirs", tmp_path / "ours", fields)


def sites(model: nn.Module) -> set[str]:
    return {name.partition(".hra_u.")[0] for name in model.state_dict() if ".hra_u." in name}


def test_a_configuration_that_peft_wrote_starts_a_new_adapter(tmp_path: Path) -> None:
    """For a task PEFT writes every name that a head may have, and itself takes such a file for a new model."""
    base = tiny("bert, classes")
    saved_by_peft(by_peft(base, r=4, task_type="SEQ_CLS"), tmp_path)
    with peft_warnings_ignored():
        theirs = peft.get_peft_model(tiny("bert, classes"), peft.HRAConfig.from_pretrained(tmp_path))
    assert theirs.peft_config["default"].modules_to_save.count("score") > 0
    ours = hra_fx.transform(base, hra_fx.HRAConfig.from_pretrained(tmp_path))
    assert sites(ours) == {name.removeprefix("base_model.model.") for name in sites(theirs)}
