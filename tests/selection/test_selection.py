"""Default targets, error messages and warnings of `select`. `test_selection_like_peft.py` compares it with PEFT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from named_models import Nested, built, tiny_bert, tiny_opt, tiny_vit
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HRA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from torch import nn

import hra_fx
from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, SelectionError
from hra_fx.selection.origin import DEFAULT_TARGETS
from hra_fx.selection.select import select

Case = tuple[Callable[[], nn.Module], dict[str, Any], str]


def bare_linear() -> nn.Module:
    return nn.Linear(2, 2)


NO_NAME: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["qeury"]},
        "`target_modules=['qeury']` matches no module of BertForSequenceClassification. Did you mean 'query'?",
    ),
    (tiny_bert, {"target_modules": ["self.qery"]}, "Did you mean 'self.query' or 'self.key' or 'self.value'?"),
    (tiny_bert, {"target_modules": "qeury"}, "Did you mean ['query']?"),
    (
        tiny_bert,
        {"target_modules": "query"},
        "A str must match the full path as a regex. To match the end of a path, use the list ['query'].",
    ),
    (
        tiny_bert,
        {"target_modules": [".*query"]},
        "In a list, '.*query' is a name and not a regex. Use the str",
    ),
    (
        tiny_bert,
        {"target_modules": []},
        "`target_modules=[]` is empty. The layers of BertForSequenceClassification are called",
    ),
    (tiny_opt, {"target_modules": ["("]}, "Available names:"),
    (Nested, {}, "because there is no default for Nested, which has no `config.model_type`. Its layers are"),
    (tiny_vit, {}, "`target_modules` is required, because there is no default for model_type 'vit'. Its layers are"),
    (nn.ReLU, {"target_modules": ["q"]}, "ReLU has no layer that can be adapted. Supported layers: nn.Linear, nn"),
    (bare_linear, {"target_modules": "all-linear"}, "The model itself is a layer (Linear), and only layers inside a"),
]
ALL_LEFT_OUT: list[Case] = [
    (
        tiny_opt,
        {"layers_to_transform": [7]},
        "`target_modules=['q_proj', 'v_proj']`, the default for 'opt', matches 6 modules such as "
        "'model.decoder.layers.0.self_attn.v_proj', but none is left after layers_to_transform=[7]. "
        "Their layer indices are 0 to 2.",
    ),
    (
        Nested,
        {"target_modules": ["head"], "exclude_modules": "he.*"},
        "['head']` matches 1 module such as 'head', but none is left after exclude_modules='he.*'.",
    ),
]
WRONG_TYPE: list[Case] = [
    (
        tiny_bert,
        {"target_modules": ["attention"]},
        "bert.encoder.layer.0.attention: `target_modules` matches this BertAttention, but only nn.Linear, nn.Conv1d to "
        "nn.Conv3d, nn.MultiheadAttention and transformers' Conv1D can be adapted. To adapt the layers inside it, use "
        "target_modules=['bert.encoder.layer.0.attention.self.query', 'bert.encoder.layer.0.attention.self.key', "
        "'bert.encoder.layer.0.attention.self.value', 'bert.encoder.layer.0.attention.output.dense'].",
    ),
    (Nested, {"target_modules": ["embed"]}, "Remove it from `target_modules`, or add exclude_modules=['embed']."),
]
TO_SAVE: list[Case] = [
    (
        tiny_bert,
        {"modules_to_save": ["clasifier"]},
        "`modules_to_save`: there is no module 'clasifier'. Did you mean 'classifier'?",
    ),
    (
        Nested,
        {"target_modules": ["sub_head"], "modules_to_save": ["head"]},
        "sub_head: a layer cannot be both adapted and saved in full, but `target_modules` matches 'sub_head' and "
        "`modules_to_save=['head']` matches 'sub_head'. Add exclude_modules=['sub_head'], or use a longer name",
    ),
]


@pytest.mark.parametrize(("make", "kwargs", "message"), NO_NAME + ALL_LEFT_OUT + WRONG_TYPE + TO_SAVE)
def test_messages(make: Callable[[], nn.Module], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(message)) as caught:
        select(built(make), HRAConfig(**kwargs))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("excluded", [["fc3"], "fc1"])
def test_unused_exclusion_warns(excluded: Any) -> None:
    config = HRAConfig(target_modules=["fc1"], exclude_modules=excluded)
    with pytest.warns(HRAWarning, match="`exclude_modules=.*` matches no module") as caught:
        hra_fx.transform(tiny_opt(), config)
    assert len(caught) == 1


def mixtral() -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_attention_heads=2, num_local_experts=3)
    )


def warned(model: nn.Module, **fields: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert select(model, HRAConfig(**fields))
    assert all(warning.category is HRAWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def test_each_name_that_matches_nothing_is_named_once() -> None:
    model = built(tiny_bert)
    assert warned(model, target_modules=["query", "valeu", "self.kye"]) == [
        "`target_modules`: the entry 'self.kye' matches no module of BertForSequenceClassification. Did you mean "
        "'self.key' or 'self.value' or 'self.query'?",
        "`target_modules`: the entry 'valeu' matches no module of BertForSequenceClassification. Did you mean 'value'?",
    ]
    # Names that match something are silent, also where another field excludes it.
    quiet = {"exclude_modules": ["value"], "modules_to_save": ["classifier"], "layers_to_transform": [0]}
    assert warned(model, target_modules=["query", "value", "classifier"], **quiet) == []
    assert warned(model, target_modules=r".*(query|valeu)") == []
    assert warned(built(Nested), target_modules=["layers.1.seq", "encoder.again.seq"]) == []  # one layer
    # So is a saved adapter, which may list the default names of its architecture.
    assert warned(model, target_modules=["query", "valeu"], inference_mode=True) == []


EXPERTS = (
    "'gate_up_proj' is a 3-D parameter of MixtralExperts, which `target_modules` does not select. Use "
    "target_parameters=['experts.gate_up_proj']."
)


def test_the_name_of_a_parameter_says_what_to_write_instead() -> None:
    with pytest.raises(SelectionError) as caught:
        select(mixtral(), HRAConfig(target_modules=["gate_up_proj", "down_proj"]))
    assert str(caught.value) == (
        "`target_modules=['down_proj', 'gate_up_proj']` matches no module of MixtralForCausalLM. 'down_proj' and "
        "'gate_up_proj' are 3-D parameters of MixtralExperts, which `target_modules` does not select. Use "
        "target_parameters=['experts.gate_up_proj', 'experts.down_proj']."
    )
    assert warned(mixtral(), target_modules=["q_proj", "gate_up_proj"]) == [
        f"`target_modules`: the entry 'gate_up_proj' matches no module of MixtralForCausalLM. {EXPERTS}"
    ]
    with pytest.raises(SelectionError) as caught:
        select(mixtral(), HRAConfig(target_modules=["experts"]))
    assert str(caught.value).endswith(
        "Its weights are 3-D parameters. Use target_parameters=['experts.gate_up_proj', 'experts.down_proj']."
    )


def test_default_targets_are_pefts() -> None:
    assert {name: t if isinstance(t, str) else list(t) for name, t in DEFAULT_TARGETS.items()} == PEFT_DEFAULTS


class Configured(nn.Module):
    """A model whose `config` is what it is given."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "o": nn.Linear(2, 2)}) for _ in range(2))


class Typed:
    model_type = "opt"


@pytest.mark.parametrize("config", [{"model_type": "opt"}, Typed()])
def test_default_targets_by_every_kind_of_config(config: object) -> None:
    assert list(select(Configured(config), HRAConfig())) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_what_an_earlier_adapter_added_is_not_selected() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].hra_u = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    for targets in ("all-linear", ".*"):
        assert list(select(model, HRAConfig(target_modules=targets))) == ["0", "1"]
    for fields in ({"target_modules": ["inner"]}, {"target_modules": ["0"], "modules_to_save": ["inner"]}):
        with pytest.raises(SelectionError, match=r"no module"):
            select(model, HRAConfig(**fields))
