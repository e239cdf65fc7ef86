"""What select() says where it refuses a configuration or warns of one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from named_models import Nested, built, tiny_bert, tiny_gpt2, tiny_opt, tiny_vit
from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.selection.select import select

Case = tuple[Callable[[], nn.Module], dict[str, Any], str]


def bare_linear() -> nn.Module:
    return nn.Linear(2, 2)


def ten_blocks() -> nn.Module:
    return nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(10))})


NO_NAME: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["qeury"]},
        "names no module of BertForSequenceClassification; did you mean 'query'?",
    ),
    (tiny_bert, {"target_modules": ["Query", "valeu"]}, "did you mean 'query' or 'value'?"),
    (tiny_bert, {"target_modules": ["self.qery"]}, "did you mean 'self.query' or 'self.key' or 'self.value'?"),
    (tiny_bert, {"target_modules": ["a.b.c.query1"]}, "did you mean 'query'?"),
    (
        tiny_bert,
        {"target_modules": ["xyz"]},
        ". The names to choose from are 'query', 'key', 'value', 'dense', 'classif",
    ),
    (tiny_bert, {"target_modules": "qeury"}, "did you mean ['query']?"),
    (
        tiny_bert,
        {"target_modules": "query"},
        "must match the whole path; to match the end of it write the list ['query'].",
    ),
    (tiny_bert, {"target_modules": "layer.0.*qu"}, "only a part of 'bert.encoder.layer.0.attention.self.query'."),
    (
        tiny_bert,
        {"target_modules": [".*query"]},
        "In a list '.*query' is a name, not a regular expression: give the str",
    ),
    (
        tiny_bert,
        {"target_modules": []},
        "target_modules: [] names nothing. The layers of BertForSequenceClassification",
    ),
    (tiny_opt, {"target_modules": ["("]}, "The names to choose from are"),
    (Nested, {}, "there is no default for Nested, which has no config.model_type. Give target_modules. The layers"),
    (tiny_vit, {}, "there is no default for model_type 'vit'. Give target_modules. The layers of this model are"),
    (nn.ReLU, {}, "It has no layer to adapt."),
    (nn.ReLU, {"target_modules": ["q"]}, "ReLU has no layer to adapt: only nn.Linear, nn.Conv1d to Conv3d, nn.Mul"),
    (bare_linear, {"target_modules": "all-linear"}, "the model is itself a Linear, and only layers inside it can be"),
]
ALL_LEFT_OUT: list[Case] = [
    (
        tiny_opt,
        {"layers_to_transform": [7]},
        "target_modules: ['q_proj', 'v_proj'], the default for 'opt', names 6 modules such as "
        "'model.decoder.layers.0.self_attn.v_proj', but nothing is left after layers_to_transform=[7] "
        "(their layer indices are 0, 1, 2).",
    ),
    (
        tiny_opt,
        {"target_modules": ["fc1"], "layers_to_transform": 1, "layers_pattern": "h"},
        "layers_to_transform=1 with layers_pattern='h' (no layer index is found in their paths)",
    ),
    (
        ten_blocks,
        {"target_modules": ["q"], "layers_to_transform": 10, "layers_pattern": "h"},
        "layers_to_transform=10 with layers_pattern='h' (their layer indices are 0 to 9)",
    ),
    (
        Nested,
        {"target_modules": ["head"], "exclude_modules": "he.*"},
        "['head'] names 1 module such as 'head', but nothing is left after exclude_modules='he.*'.",
    ),
    (
        tiny_opt,
        {"target_modules": ["fc1"], "exclude_modules": ["0.fc1"], "layers_to_transform": 0, "modules_to_save": ["2"]},
        "nothing is left after exclude_modules=['0.fc1'] and layers_to_transform=0 "
        "(their layer indices are 0, 1, 2) and modules_to_save=['2'].",
    ),
]
WRONG_TYPE: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["attention"]},
        "bert.encoder.layer.0.attention: target_modules names it, but it is a BertAttention, and only nn.Linear, "
        "nn.Conv1d to Conv3d, nn.MultiheadAttention and transformers' Conv1D can be adapted. To adapt the layers "
        "inside it write target_modules=['attention.self.query', 'attention.self.key', 'attention.self.value', "
        "'attention.output.dense'].",
    ),
    (tiny_bert, {"target_modules": ["encoder"]}, "write target_modules=['query', 'key', 'value', 'dense']."),
    (Nested, {"target_modules": ["experts.0"]}, "write target_modules=['experts.0.w1', 'experts.0.q']."),
    (Nested, {"target_modules": ["embed"]}, "embed: target_modules names it, but it is a Embedding"),
    (Nested, {"target_modules": ["embed"]}, "Name it no more, or add exclude_modules=['embed']."),
    (Nested, {"target_modules": ".*norm|.*head"}, "layers.0.norm: target_modules names it, but it is a LayerNorm"),
    (tiny_gpt2, {"target_modules": ["wpe"]}, "transformer.wpe: target_modules names it, but it is a Embedding"),
]
TO_SAVE: list[Case] = [
    (tiny_bert, {"modules_to_save": ["clasifier"]}, "no module is called 'clasifier'; did you mean 'classifier'?"),
    (tiny_bert, {"modules_to_save": ["classifier", "zzzz"]}, "modules_to_save: no module is called 'zzzz'. The names"),
    (
        Nested,
        {"target_modules": ["sub_head"], "modules_to_save": ["head"]},
        "sub_head: is to be adapted, and modules_to_save=['head'] saves 'sub_head' in full. "
        "Add exclude_modules=['sub_head'], or write the whole name of what is to be saved.",
    ),
]


@pytest.mark.parametrize(("make", "kwargs", "message"), NO_NAME + ALL_LEFT_OUT + WRONG_TYPE + TO_SAVE)
def test_messages(make: Callable[[], nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        select(built(make), HRAConfig(**kwargs))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("excluded", [["fc3"], "fc1", r".*\.fc3"])
def test_unused_exclusion_warns(excluded: Any) -> None:
    config = HRAConfig(target_modules=["fc1"], exclude_modules=excluded)
    with pytest.warns(HRAWarning, match="exclude_modules: .* leaves no module out") as caught:
        assert len(select(built(tiny_opt), config)) == 3
    assert len(caught) == 1


def test_used_exclusion_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select(built(tiny_opt), HRAConfig(target_modules=["fc1"], exclude_modules=["fc2"]))
