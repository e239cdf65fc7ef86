"""`print_trainable_parameters` prints PEFT's line, and `get_nb_trainable_parameters` gives its numbers."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
from integrations.peft_parity.sides import by_peft, by_us, net, peft_warnings_ignored
from integrations.peft_parity.tiny import MODELS, tiny
from torch import nn

import hra_fx

Fields = dict[str, Any]
QV: Fields = {"r": 4, "target_modules": ["query", "value"]}
NETS: dict[str, Fields] = {
    "plain": QV,
    "odd": {"r": 3, "target_modules": ["query", "value"]},
    "GS, random": {"r": 4, "apply_GS": True, "init_weights": False, "target_modules": ["query"]},
    "conv": {"r": 4, "target_modules": ["conv"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*\.1\.(query|out)"},
    "bias all": QV | {"bias": "all"},
    "bias hra_only": QV | {"bias": "hra_only"},
    "bias all, conv": {"r": 2, "target_modules": ["conv", "out"], "bias": "all"},
    "saved head": QV | {"modules_to_save": ["classifier"]},
    "saved nested head": QV | {"modules_to_save": ["head"]},
    "saved embedding": QV | {"modules_to_save": ["embed"]},
    "saved all": QV | {"modules_to_save": ["embed", "norm", "head", "classifier"]},
    "saved head, bias hra_only": QV | {"modules_to_save": ["head"], "bias": "hra_only"},
    "saved head, bias all": QV | {"modules_to_save": ["head"], "bias": "all"},
    "saved norm, bias all": QV | {"modules_to_save": ["norm", "classifier"], "bias": "all"},
    "inference": QV | {"inference_mode": True},
}


def line(model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    model.print_trainable_parameters()
    return capsys.readouterr().out


@pytest.mark.parametrize("fields", NETS.values(), ids=NETS.keys())
def test_small_net(fields: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = by_peft(net(), **fields), by_us(net(), **fields)
    assert line(ours, capsys) == line(theirs, capsys)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def conv_nets() -> dict[str, tuple[nn.Module, Fields]]:
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten()]
    return {
        "convs": (nn.Sequential(*body), {"target_modules": ["0", "3"]}),
        "one of them": (nn.Sequential(*body), {"target_modules": ["3"], "bias": "all"}),
        "head": (nn.Sequential(*body, nn.Linear(16, 10)), {"target_modules": ["0"], "modules_to_save": ["5"]}),
        "norm": (nn.Sequential(*body), {"target_modules": ["0"], "modules_to_save": ["1"], "bias": "hra_only"}),
    }


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("name", conv_nets())
def test_conv_nets(name: str, r: int, capsys: pytest.CaptureFixture[str]) -> None:
    base, fields = conv_nets()[name]
    assert line(by_us(base, r=r, **fields), capsys) == line(by_peft(base, r=r, **fields), capsys)


TRANSFORMERS: dict[str, tuple[str, Fields]] = {
    "bert": ("bert, classes", {"r": 8}),
    "bert, task": ("bert, classes", {"r": 8, "task_type": "SEQ_CLS"}),
    "bert, task, all": ("bert, classes", {"r": 2, "task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "bert, task, bias all": ("bert, classes", {"r": 2, "task_type": "SEQ_CLS", "bias": "all"}),
    "bert, task, bias own": ("bert, classes", {"r": 2, "task_type": "SEQ_CLS", "bias": "hra_only"}),
    "bert, odd, pooler": ("bert, classes", {"r": 3, "modules_to_save": ["pooler", "classifier"]}),
    "bert, GS": ("bert, classes", {"r": 2, "apply_GS": True, "task_type": "SEQ_CLS"}),
    "bert, tokens": ("bert, tokens", {"r": 2, "task_type": "TOKEN_CLS"}),
    "bert, answers": ("bert, answers", {"r": 2, "task_type": "QUESTION_ANS"}),
    "llama": ("llama", {"r": 4, "task_type": "CAUSAL_LM"}),
    "llama, all": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "llama, head": ("llama", {"r": 4, "modules_to_save": ["lm_head"]}),
    "llama, head and embedding": ("llama", {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "llama, one layer": ("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "llama, classes": ("llama, classes", {"r": 4, "task_type": "SEQ_CLS"}),
    "t5": ("t5", {"r": 4, "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.mark.parametrize(("name", "fields"), TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def test_transformers(name: str, fields: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = by_peft(tiny(name), **fields), by_us(tiny(name), **fields)
    assert line(ours, capsys) == line(theirs, capsys)


def test_a_head_tied_to_the_embedding_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    base = MODELS["llama"]()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert line(by_us(base, r=4), capsys) == line(by_peft(base, r=4), capsys)


SECOND: dict[str, Fields] = {
    "same layers": QV,
    "other layers": {"r": 2, "target_modules": ["out", "conv"]},
    "odd": {"r": 3, "target_modules": ["query", "out"]},
    "head": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    "nested head": {"r": 2, "target_modules": ["out"], "modules_to_save": ["head", "embed"]},
}


@pytest.mark.parametrize("first", [QV, QV | {"modules_to_save": ["classifier"]}], ids=["plain", "head"])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND.keys())
def test_two_adapters(first: Fields, second: Fields, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = by_peft(net(), **first), by_us(net(), **first)
    with peft_warnings_ignored():
        theirs.add_adapter("other", peft.HRAConfig(**copy.deepcopy(second)))
    ours.add_adapter("other", hra_fx.HRAConfig(**second))
    assert line(ours, capsys) == line(theirs, capsys)
    for name in ("other", "default"):
        for model in (theirs, ours):
            model.set_adapter(name)
        assert line(ours, capsys) == line(theirs, capsys)
    for model in (theirs, ours):
        model.delete_adapter("other")
    assert line(ours, capsys) == line(theirs, capsys)


def test_while_merged(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = by_peft(net(), **QV), by_us(net(), **QV)
    for model in (theirs, ours):
        model.merge_adapter()
    assert line(ours, capsys) == line(theirs, capsys)
