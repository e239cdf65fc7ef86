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
    ours = ["extra", "pairs", "rank_pattern", "target_parameters"]
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
    assert (ours.peft_version, ours.extra) == (peft.__version__, {})
    HRAConfig(**kwargs).save_pretrained(folder / "ours")
    for reader in (peft.HRAConfig, peft.PeftConfig):
        theirs = reader.from_pretrained(str(folder / "ours"))
        assert type(theirs) is peft.HRAConfig
        assert (values(theirs), theirs.peft_version) == (values(ours), peft.__version__)


@given(keywords)
@settings(max_examples=50, deadline=None)
def test_dict_and_copies_give_the_config_back(kwargs: dict[str, Any]) -> None:
    config = HRAConfig(**kwargs, extra={"note": [1, {"a": None}]})
    assert HRAConfig.from_dict(config.to_dict()) == config
    assert HRAConfig.from_dict(json.loads(config.to_json_string())) == config
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=3) == HRAConfig(**{**kwargs, "r": 3}, extra=config.extra)
    config.to_dict()["note"].append(2)
    assert config.extra == {"note": [1, {"a": None}]}, "no alias"


def test_unknown_keys_of_a_file_are_kept(tmp_path: Path) -> None:
    more = {"hra_other": {"rank": 3}, "extra": {"r": 1}, "rank": 5}
    text = json.dumps({"peft_type": "HRA", "r": 4, **more})
    (tmp_path / "adapter_config.json").write_text(text)
    config = HRAConfig.from_pretrained(tmp_path)
    assert config.r == 4
    assert config.extra == more
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: written[name] for name in more} == more
    with pytest.warns(UserWarning, match="hra_other"):
        assert values(peft.HRAConfig.from_pretrained(str(tmp_path))) == values(config)


@pytest.mark.parametrize(
    ("field", "given_", "kept"),
    [
        ("target_modules", ("a", "b"), {"a", "b"}),
        ("layers_to_transform", (2, 0), [2, 0]),
        ("layers_to_transform", {2, 0}, [0, 2]),
        ("modules_to_save", {"b", "a"}, ["a", "b"]),
        ("peft_type", peft.PeftType.HRA, "HRA"),
        ("task_type", peft.TaskType.SEQ_CLS, "SEQ_CLS"),
        ("base_model_name_or_path", Path("a"), "a"),
    ],
)
def test_normalization(field: str, given_: Any, kept: Any) -> None:
    value = getattr(HRAConfig(**{field: given_}), field)
    assert value == kept
    assert type(value) is type(kept)


BAD_FIELDS: list[tuple[str, list[Any], str]] = [
    ("r", [0, -2, True, 8.0, "8", None], "`r` must be a positive int, got {}."),
    ("init_weights", ["gaussian"], "`init_weights` must be a bool, got {}."),
    ("bias", [None], "`bias` must be one of 'none', 'all', 'hra_only', got {}."),
    ("bias", ["lora_only"], "got 'lora_only'. Use 'hra_only' for the biases of the adapted layers."),
    ("peft_type", ["LORA"], "`peft_type` must be 'HRA', got {}. Only HRA can be loaded."),
    ("task_type", ["CHAT", 1], "`task_type` must be one of None, 'SEQ_CLS', "),
    ("target_modules", [3, {"q": 1}, b"q"], "`target_modules` must be a str or a list of str, got {}."),
    ("target_modules", [["q", 1]], "`target_modules` must be a str or a list of str, got {}."),
    ("target_modules", ["(q"], "`target_modules`: {} is not a valid regular expression: missing ), unterminated"),
    ("layers_to_transform", [-1, True, "1"], "`layers_to_transform` must be an int >= 0 or a list of them, got {}."),
    ("layers_pattern", ["h["], "`layers_pattern`: {} is not a valid regular expression: "),
    ("modules_to_save", ["head", [""]], "`modules_to_save` must be a list of names that are not empty, got {}."),
    ("modules_to_save", [["head", "x)"]], "`modules_to_save`: 'x)' is not a valid regular expression: unbalanced"),
    ("target_parameters", [[3]], "`target_parameters` must be a str or a list of str, got {}."),
    ("rank_pattern", [{"q": 0}, {"q": True}], "`rank_pattern['q']` must be a positive int, got "),
    ("rank_pattern", [[("q", 1)], {"": 1}], "`rank_pattern` must be a dict of names and ranks, got {}."),
    ("rank_pattern", [{"(": 1}], "`rank_pattern`: '(' is not a valid regular expression: missing ), unterminated"),
    ("rank_pattern", [{"(?i)q": 1}], "`rank_pattern`: '(?i)q' is not a valid regular expression: global flags not"),
    (
        "trainable_token_indices",
        [[3]],
        'removed in 0.5. To train the embeddings in full, use modules_to_save=["embed_t',
    ),
    ("extra", [{"trainable_token_indices": [3]}], "no field `trainable_token_indices`. It was removed in 0.5."),
    ("extra", [None, {1: 2}], "`extra` must be a dict with str keys, got {}."),
    ("extra", [{"r": 2}], "`extra` must not contain the field 'r'. Pass it as a keyword instead."),
    (
        "lora_alpha",
        [16],
        "HRAConfig has no field `lora_alpha`. HRA has no alpha, because Q is orthogonal. Remove it. To weaken an "
        "adapter, call hra_fx.set_scale",
    ),
    ("lora_dropout", [0.1], "HRAConfig has no field `lora_dropout`. HRA has no dropout. Remove it"),
    ("target_module", [1], "HRAConfig has no field `target_module`. Did you mean `target_modules`"),
    ("zzz", [1], "HRAConfig has no field `zzz`. The fields are task_type, peft_type, "),
]


@pytest.mark.parametrize(("field", "bad", "message"), BAD_FIELDS)
def test_bad_fields_are_named(field: str, bad: list[Any], message: str) -> None:
    for value in bad:
        others = {"layers_to_transform": 0} if field == "layers_pattern" else {}
        with pytest.raises(ConfigError, match=re.escape(message.replace("{}", repr(value)))) as caught:
            HRAConfig(**{field: value}, **others)
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


def test_positional_arguments_are_refused() -> None:
    message = "HRAConfig takes keyword arguments only, got 8. For example, use r"
    with pytest.raises(ConfigError, match=re.escape(message)):
        HRAConfig(8)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "cannot be read as JSON ("),
        (None, "No such file or directory"),
        ("{", "cannot be read as JSON (Expecting property name"),
        ("[1]", "must contain a JSON object, got a list."),
        ('{"peft_type": "OFT", "r": 0}', "`peft_type` must be 'HRA', got 'OFT'. Only HRA can be loaded."),
        ('{"peft_type": null}', "`peft_type` must be 'HRA', got None."),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    path = tmp_path / "adapter_config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        HRAConfig.from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_saving_into_a_file_or_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    HRAConfig(r=5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    before = path.read_text()
    with pytest.raises(ConfigError, match="`save_directory` must be a directory, but this is a file"):
        HRAConfig().save_pretrained(path)
    with pytest.raises(ConfigError, match="`auto_mapping` or `extra` cannot be written as JSON"):
        HRAConfig(extra={"x": object()}).save_pretrained(tmp_path)
    assert path.read_text() == before


# ---- the kinds of error: one base, and `ValueError` where a caller's argument is to blame ----

ARGUMENT = {"AdapterError", "CheckpointError", "ConfigError", "SelectionError", "VisualizeError"}
KINDS = [name for name in errors.__all__ if name not in ("HRAError", "HRAWarning")]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_an_hra_error_and_pickles(name: str) -> None:
    error = getattr(errors, name)("layer: reason")
    assert isinstance(error, errors.HRAError)
    assert isinstance(error, ValueError) == (name in ARGUMENT)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), "layer: reason")
    assert not issubclass(errors.HRAWarning, errors.HRAError)
