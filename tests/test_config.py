"""HRAConfig against the real peft.HRAConfig: fields, defaults, normalization, files in both directions, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings, strategies as st

from hra_fx import errors
from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError, HRAError, HRAWarning

FIELDS = [f.name for f in dataclasses.fields(peft.HRAConfig)]

names = st.sampled_from(["q", "query", "layer.0.fc", "dense", "h"])
name_lists = st.lists(names, min_size=1, max_size=4)
regexes = st.sampled_from([r".*\.(q|v)", "all-linear", "x+", ""])
free = {
    "r": st.integers(1, 64),
    "apply_GS": st.booleans(),
    "init_weights": st.booleans(),
    "inference_mode": st.booleans(),
    "bias": st.sampled_from(["none", "all", "hra_only"]),
    "task_type": st.sampled_from([None, *(str(t.value) for t in peft.TaskType)]),
    "revision": st.sampled_from([None, "main"]),
    "base_model_name_or_path": st.sampled_from([None, "a/b"]),
    "auto_mapping": st.sampled_from([None, {"base_model_class": "Net", "parent_library": "here"}]),
    "exclude_modules": st.none() | name_lists | regexes,
    "modules_to_save": st.none() | name_lists,
}
indices = st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3)
by_regex = st.fixed_dictionaries({"target_modules": regexes})
by_name = st.fixed_dictionaries({"target_modules": st.none() | name_lists})
by_layer = st.fixed_dictionaries(
    {"target_modules": st.none() | name_lists, "layers_to_transform": indices, "layers_pattern": names | name_lists}
)
keywords = st.tuples(st.fixed_dictionaries({}, optional=free), by_regex | by_name | by_layer).map(lambda t: t[0] | t[1])


def values(config: Any) -> dict[str, Any]:
    """Every field that PEFT has, but for the version, which only PEFT knows."""
    return {name: getattr(config, name) for name in FIELDS if name != "peft_version"}


def test_fields_and_defaults_are_pefts() -> None:
    ours = ["pairs", "rank_pattern", "target_parameters"]
    assert sorted(f.name for f in dataclasses.fields(HRAConfig)) == sorted([*FIELDS, *ours])
    assert values(HRAConfig()) == values(peft.HRAConfig())
    assert HRAConfig().peft_version is None


@given(keywords)
@settings(max_examples=50, deadline=None)
def test_files_go_both_ways_between_peft_and_us(tmp_path_factory: pytest.TempPathFactory, kwargs: Any) -> None:
    folder = tmp_path_factory.mktemp("config")
    peft.HRAConfig(**kwargs).save_pretrained(str(folder / "peft"))
    ours = HRAConfig.from_pretrained(folder, subfolder="peft")
    assert values(ours) == values(peft.HRAConfig(**kwargs))
    assert ours.peft_version == peft.__version__
    HRAConfig(**kwargs).save_pretrained(folder / "ours")
    for reader in (peft.HRAConfig, peft.PeftConfig):
        theirs = reader.from_pretrained(str(folder / "ours"))
        assert type(theirs) is peft.HRAConfig
        assert (values(theirs), theirs.peft_version) == (values(ours), peft.__version__)


@given(keywords)
@settings(max_examples=50, deadline=None)
def test_dict_and_copies_give_the_config_back(kwargs: dict[str, Any]) -> None:
    config = HRAConfig(**kwargs)
    assert HRAConfig.from_dict(config.to_dict()) == config
    assert HRAConfig.from_dict(json.loads(config.to_json_string())) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=3) == HRAConfig(**{**kwargs, "r": 3})
    if isinstance(config.exclude_modules, set):
        config.to_dict()["exclude_modules"].append("2")
        assert config == HRAConfig(**kwargs), "no alias"


def test_unknown_entries_of_a_file_are_ignored_with_a_warning(tmp_path: Path) -> None:
    more = {"hra_other": {"rank": 3}, "rank": 5, "not_set": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "HRA", "r": 4, **more}))
    with pytest.warns(HRAWarning, match=r"not fields of HRAConfig and are ignored: \['hra_other', 'rank'\]\."):
        assert HRAConfig.from_pretrained(tmp_path) == HRAConfig(r=4)


@pytest.mark.parametrize(
    ("field", "given_", "kept"),
    [
        ("target_modules", ("a", "b"), {"a", "b"}),
        ("layers_to_transform", (2, 0), [2, 0]),
        ("layers_to_transform", range(2), [0, 1]),
        ("modules_to_save", {"b", "a"}, ["a", "b"]),
        ("base_model_name_or_path", Path("a"), "a"),
    ],
)
def test_normalization(field: str, given_: Any, kept: Any) -> None:
    value = getattr(HRAConfig(**{field: given_}), field)
    assert value == kept
    assert type(value) is type(kept)


BAD_FIELDS: list[tuple[str, list[Any], str]] = [
    ("r", [0, -2, True, 8.0, "8", None], "a positive int"),
    ("init_weights", ["gaussian"], "a bool"),
    ("bias", [None, "lora_only"], "'none', 'all' or 'hra_only'"),
    ("peft_type", ["LORA", None], "'HRA', because only adapters of this method can be loaded"),
    ("task_type", ["CHAT", 1], "None or one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM, TOKEN_CLS, QUESTION_ANS, FEATURE_EX"),
    ("base_model_name_or_path", [3], "a str or a path"),
    ("target_modules", [3, {"q": 1}, b"q", ["q", 1], "("], "a list of str or a valid regular expression"),
    ("layers_to_transform", [-1, "1", [0, -1]], "an int >= 0 or a list of them"),
    ("modules_to_save", ["head", [""]], "a list of names"),
    ("target_parameters", ["experts", [3]], "a list of names"),
    ("layers_pattern", [["h("]], "a list of str or a valid regular expression"),
    ("rank_pattern", [{"q": 0}, {"q": True}, [("q", 1)], {"": 1}, {"(": 1}], "a dict of valid regular expressions"),
]


@pytest.mark.parametrize(("field", "bad", "message"), BAD_FIELDS)
def test_bad_fields_are_named(field: str, bad: list[Any], message: str) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=re.escape(f"`{field}` must be {message}")) as caught:
            HRAConfig(**{field: value})
        assert str(caught.value).endswith(f", got {value!r}.")
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, HRAError)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": "q", "layers_to_transform": 1},
        {"target_modules": "all-linear", "layers_to_transform": 0},
        {"target_modules": "q", "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": "h"},
        {"layers_pattern": ["h"]},
        # PEFT accepts the following.
        {"layers_pattern": ""},
        {"layers_to_transform": 0},
        {"layers_to_transform": [], "layers_pattern": "h"},
        {"target_modules": []},
        {"target_modules": ["*not a regex("]},
    ],
)
def test_fields_that_exclude_each_other_say_what_peft_says(kwargs: dict[str, Any]) -> None:
    try:
        theirs = peft.HRAConfig(**kwargs)
    except ValueError as error:
        with pytest.raises(ConfigError, match=re.escape(str(error).strip())):
            HRAConfig(**kwargs)
    else:
        assert values(HRAConfig(**kwargs)) == values(theirs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "cannot be read as JSON ("),
        (None, "No such file or directory"),
        ("{", "cannot be read as JSON (Expecting property name"),
        ("[1]", "must contain a JSON object, got a list."),
        ('{"peft_type": "OFT", "r": 0}', "`peft_type` must be 'HRA', because "),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "adapter_config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        HRAConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


# ---- the kinds of error: one base, and `ValueError` where a caller's argument is to blame ----

ARGUMENT = {"AdapterError", "CheckpointError", "ConfigError", "SelectionError", "VisualizeError"}


def test_every_kind_is_an_hra_error_and_those_of_arguments_are_value_errors() -> None:
    kinds = {name: getattr(errors, name) for name in errors.__all__ if name != "HRAWarning"}
    assert all(issubclass(kind, HRAError) for kind in kinds.values())
    assert {name for name, kind in kinds.items() if issubclass(kind, ValueError)} == ARGUMENT
