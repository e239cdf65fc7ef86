"""HRAConfig against the real peft.HRAConfig: fields, defaults, normalisation, files in both directions, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings, strategies as st

from hra_fx.config import HRAConfig
from hra_fx.errors import ConfigError, HRAError

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
    assert sorted(f.name for f in dataclasses.fields(HRAConfig)) == sorted([*FIELDS, "extra"])
    assert values(HRAConfig()) == values(peft.HRAConfig())
    assert HRAConfig().peft_version is None


@given(keywords)
def test_construction_gives_pefts_values(kwargs: dict[str, Any]) -> None:
    assert values(HRAConfig(**kwargs)) == values(peft.HRAConfig(**kwargs))


@given(keywords)
@settings(max_examples=50, deadline=None)
def test_a_file_of_peft_opens_here(tmp_path_factory: pytest.TempPathFactory, kwargs: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("peft")
    theirs = peft.HRAConfig(**kwargs)
    theirs.save_pretrained(str(folder))
    ours = HRAConfig.from_pretrained(folder)
    assert values(ours) == values(theirs)
    assert ours.peft_version == peft.__version__
    assert ours.extra == {}


@given(keywords)
@settings(max_examples=50, deadline=None)
def test_our_file_opens_in_peft(tmp_path_factory: pytest.TempPathFactory, kwargs: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("ours")
    ours = HRAConfig(**kwargs)
    ours.save_pretrained(folder)
    for reader in (peft.HRAConfig, peft.PeftConfig):
        theirs = reader.from_pretrained(str(folder))
        assert type(theirs) is peft.HRAConfig
        assert values(theirs) == values(ours)
        assert theirs.peft_version == peft.__version__


@given(keywords)
def test_dict_and_copies_give_the_config_back(kwargs: dict[str, Any]) -> None:
    config = HRAConfig(**kwargs, extra={"note": [1, {"a": None}]})
    assert HRAConfig.from_dict(config.to_dict()) == config
    assert HRAConfig.from_dict(json.loads(config.to_json_string())) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=3) == HRAConfig(**{**kwargs, "r": 3}, extra=config.extra)


def test_file_has_pefts_style_with_sorted_lists(tmp_path: Path) -> None:
    peft.HRAConfig(target_modules=["only"]).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    HRAConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again" / "deeper")
    assert (tmp_path / "again" / "deeper" / "adapter_config.json").read_text() == text
    assert HRAConfig(target_modules=["c", "a", "b"]).to_dict()["target_modules"] == ["a", "b", "c"]


def test_subfolder(tmp_path: Path) -> None:
    HRAConfig(r=3).save_pretrained(tmp_path / "other")
    assert HRAConfig.from_pretrained(tmp_path, subfolder="other").r == 3


def test_unknown_keys_of_a_file_are_kept(tmp_path: Path) -> None:
    more = {"hra_anchor": {"rank": 3}, "extra": {"r": 1}, "rank": 5}
    text = json.dumps({"peft_type": "HRA", "r": 4, **more})
    (tmp_path / "adapter_config.json").write_text(text)
    config = HRAConfig.from_pretrained(tmp_path)
    assert config.r == 4
    assert config.extra == more
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: written[name] for name in more} == more
    with pytest.warns(UserWarning, match="hra_anchor"):
        assert values(peft.HRAConfig.from_pretrained(str(tmp_path))) == values(config)


def test_no_alias_to_what_was_given() -> None:
    targets, extra, nested = ["a"], {"k": 1}, {"base": ["x"]}
    config = HRAConfig(target_modules=targets, extra=extra, auto_mapping=nested)
    targets.append("b")
    extra["l"] = 2
    config.to_dict()["auto_mapping"]["base"].append("y")
    assert config.target_modules == {"a"}
    assert config.extra == {"k": 1}
    assert nested == {"base": ["x"]}


@pytest.mark.parametrize(
    ("field", "given_", "kept"),
    [
        ("target_modules", ("a", "b"), {"a", "b"}),
        ("target_modules", {"a"}, {"a"}),
        ("exclude_modules", frozenset({"a"}), {"a"}),
        ("layers_to_transform", (2, 0), [2, 0]),
        ("layers_to_transform", {2, 0}, [0, 2]),
        ("layers_to_transform", range(3), [0, 1, 2]),
        ("layers_to_transform", [], []),
        ("modules_to_save", ("b", "a"), ["b", "a"]),
        ("modules_to_save", {"b", "a"}, ["a", "b"]),
        ("peft_type", peft.PeftType.HRA, "HRA"),
        ("task_type", peft.TaskType.SEQ_CLS, "SEQ_CLS"),
        ("base_model_name_or_path", Path("a"), "a"),
    ],
)
def test_normalisation(field: str, given_: Any, kept: Any) -> None:
    value = getattr(HRAConfig(**{field: given_}), field)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "r: 0 is no rank. It must be an int > 0, such as 8."),
        ({"r": -2}, "r: -2 is no rank."),
        ({"r": True}, "r: True is no rank."),
        ({"r": 8.0}, "r: 8.0 is no rank."),
        ({"r": "8"}, "r: '8' is no rank."),
        ({"r": None}, "r: None is no rank."),
        ({"apply_GS": 1}, "apply_GS: 1 is not a bool. Give True or False."),
        ({"init_weights": "gaussian"}, "init_weights: 'gaussian' is not a bool."),
        ({"inference_mode": None}, "inference_mode: None is not a bool."),
        ({"bias": "lora_only"}, "bias: 'lora_only' is not one of 'none', 'all', 'hra_only'."),
        ({"bias": None}, "bias: None is not one of"),
        ({"peft_type": "LORA"}, "peft_type: 'LORA' is not one of 'HRA'."),
        ({"task_type": "CHAT"}, "task_type: 'CHAT' is not one of 'SEQ_CLS', "),
        ({"revision": 3}, "revision: 3 is not a string."),
        ({"peft_version": 0.21}, "peft_version: 0.21 is not a string."),
        ({"base_model_name_or_path": 1}, "base_model_name_or_path: 1 is not a string."),
        ({"auto_mapping": []}, "auto_mapping: [] is not a dict."),
        ({"target_modules": 3}, "target_modules: 3 is neither a string nor a list of strings."),
        ({"target_modules": {"q": 1}}, "target_modules: {'q': 1} is neither a string nor"),
        ({"target_modules": b"q"}, "target_modules: b'q' is neither"),
        ({"target_modules": ["q", 1]}, "target_modules: the entry 1 is not a string."),
        (
            {"target_modules": "(q"},
            "target_modules: '(q' is not a regular expression: missing ), unterminated subpattern",
        ),
        (
            {"exclude_modules": "*q"},
            "exclude_modules: '*q' is not a regular expression: nothing to repeat at position 0.",
        ),
        ({"layers_to_transform": -1}, "layers_to_transform: -1 is no layer index. Indices are ints >= 0."),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform: -1 is no layer index."),
        ({"layers_to_transform": True}, "layers_to_transform: True is no layer index."),
        ({"layers_to_transform": "1"}, "layers_to_transform: '1' is no layer index."),
        ({"layers_to_transform": [1.0]}, "layers_to_transform: 1.0 is no layer index."),
        ({"layers_to_transform": 0, "layers_pattern": "h["}, "layers_pattern: 'h[' is not a regular expression: "),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "("]}, "layers_pattern: '(' is not a regular expression: "),
        (
            {"layers_to_transform": 0, "layers_pattern": "(?P<idx>h)"},
            "layers_pattern: '(?P<idx>h)' is not a regular expression where it is used, inside ",
        ),
        ({"layers_to_transform": 0, "layers_pattern": 3}, "layers_pattern: 3 is neither a string nor a list"),
        ({"layers_to_transform": 0, "layers_pattern": [3]}, "layers_pattern: the entry 3 is not a string."),
        ({"modules_to_save": "head"}, "modules_to_save: 'head' is a string, not a list of names. Write ['head']."),
        ({"modules_to_save": ["head", "x)"]}, "modules_to_save: 'x)' is not a regular expression: unbalanced"),
        ({"modules_to_save": [""]}, "modules_to_save: '' is no name."),
        ({"modules_to_save": [None]}, "modules_to_save: the entry None is not a string."),
        ({"modules_to_save": 5}, "modules_to_save: 5 is neither"),
        ({"extra": None}, "extra: None is not a dict with string keys."),
        ({"extra": {1: 2}}, "extra: {1: 2} is not a dict with string keys."),
        ({"extra": {"r": 2}}, "extra: 'r' is a field of HRAConfig. Give it as a keyword."),
        ({"rank": 4}, "rank: not a field of HRAConfig; did you mean 'r'?"),
        ({"Rank": 4}, "did you mean 'r'?"),
        ({"lora_r": 4}, "did you mean 'r'?"),
        ({"apply_gs": True}, "apply_gs: not a field of HRAConfig; did you mean 'apply_GS'?"),
        ({"gram_schmidt": True}, "did you mean 'apply_GS'?"),
        ({"target_module": ["q"]}, "did you mean 'target_modules'?"),
        ({"targets": ["q"]}, "did you mean 'target_modules'?"),
        ({"modules_to_exclude": ["q"]}, "did you mean 'exclude_modules'?"),
        ({"layer_to_transform": 1}, "did you mean 'layers_to_transform'?"),
        ({"init_hra_weights": True}, "did you mean 'init_weights'?"),
        ({"zzz": 1}, "zzz: not a field of HRAConfig; the fields are task_type, peft_type, "),
    ],
)
def test_bad_fields_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        HRAConfig(**kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, HRAError)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": "q", "layers_to_transform": 1},
        {"target_modules": "q", "layers_to_transform": []},
        {"target_modules": "all-linear", "layers_to_transform": 0},
        {"target_modules": "q", "layers_pattern": "h"},
        {"target_modules": "q", "layers_pattern": ""},
        {"target_modules": "q", "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": "h"},
        {"layers_pattern": ["h"]},
    ],
)
def test_fields_that_exclude_each_other_say_what_peft_says(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:
        peft.HRAConfig(**kwargs)
    with pytest.raises(ConfigError) as ours:
        HRAConfig(**kwargs)
    assert str(theirs.value).strip() in str(ours.value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"layers_pattern": ""},
        {"layers_pattern": []},
        {"layers_to_transform": 0},
        {"layers_to_transform": [], "layers_pattern": "h"},
        {"target_modules": []},
        {"target_modules": ["*not a regex("]},
    ],
)
def test_what_peft_accepts_at_the_edges_is_accepted(kwargs: dict[str, Any]) -> None:
    assert values(HRAConfig(**kwargs)) == values(peft.HRAConfig(**kwargs))


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=re.escape("HRAConfig: takes keyword arguments only, got 8. Write for example r")
    ):
        HRAConfig(8)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory). Give the local directory"),
        ("{", "is not JSON (Expecting property name"),
        ("[1]", "holds a JSON list, a configuration is an object."),
        ('{"peft_type": "LORA", "r": 8}', "peft_type: 'LORA' is not one of 'HRA'."),
        ('{"peft_type": null}', "peft_type: None is not one of 'HRA'."),
        ('{"peft_type": "HRA", "r": 0}', "r: 0 is no rank."),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "adapter_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        HRAConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=re.escape("adapter_config.json: is not JSON")):
        HRAConfig.from_pretrained(tmp_path)


def test_saving_into_a_file_or_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    HRAConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    before = path.read_text()
    with pytest.raises(ConfigError, match="is a file"):
        HRAConfig().save_pretrained(path)
    with pytest.raises(ConfigError, match="auto_mapping or extra cannot be written as JSON"):
        HRAConfig(extra={"x": object()}).save_pretrained(tmp_path)
    assert path.read_text() == before


def test_construction_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HRAConfig(r=3, target_modules=["a"], layers_to_transform=[0], layers_pattern="h")
