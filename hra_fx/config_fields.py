"""What each field of `HRAConfig` accepts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from hra_fx.errors import ConfigError

#: The task types of PEFT.
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def check_positive_int(name: str, value: Any) -> int:
    """Check that an argument is a positive int."""
    if not _is_positive_int(value):
        raise ConfigError(f"`{name}` must be a positive int, got {value!r}.")
    return value  # type: ignore[no-any-return]


def check_field(name: str, value: Any) -> None:
    """Check the value of a field of `HRAConfig`."""
    accepts, what = _FIELDS.get(name, (lambda _: True, ""))
    if not accepts(value):
        raise ConfigError(f"`{name}` must be {what}, got {value!r}.")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    return is_collection and all(isinstance(entry, kind) for entry in value)


def _is_names(value: Any) -> bool:
    return value is None or _is_list(value, str)


def _is_names_or_regex(value: Any) -> bool:
    return _is_regex(value) or _is_names(value)


def _is_patterns(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return _is_names(names) and all(_is_regex(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names or ())


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_indices(value: Any) -> bool:
    indices = [value] if isinstance(value, int) else value
    return value is None or (_is_list(indices, int) and all(index >= 0 for index in indices))


def _is_ranks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        pattern and _is_regex(rf"(.*\.)?({pattern})$") and _is_positive_int(rank) for pattern, rank in value.items()
    )


_NAMES = "a list of str or a valid regular expression"
#: Field -> the check of its value, and what a value must be. The method comes first, because files of other methods
#: also differ in other fields.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "HRA", "'HRA', because only adapters of this method can be loaded"),
    "task_type": (lambda value: value is None or value in _TASKS, f"None or one of {', '.join(_TASKS)}"),
    "bias": (lambda value: value in ("none", "all", "hra_only"), "'none', 'all' or 'hra_only'"),
    "r": (_is_positive_int, "a positive int"),
    "inference_mode": (_is_bool, "a bool"),
    "apply_GS": (_is_bool, "a bool"),
    "init_weights": (_is_bool, "a bool"),
    "pairs": (_is_bool, "a bool"),
    "base_model_name_or_path": (lambda value: isinstance(value, str | os.PathLike | None), "a str or a path"),
    "target_modules": (_is_names_or_regex, _NAMES),
    "exclude_modules": (_is_names_or_regex, _NAMES),
    "layers_to_transform": (_is_indices, "an int >= 0 or a list of them"),
    "layers_pattern": (_is_patterns, _NAMES),
    # An empty name would match every module.
    "modules_to_save": (lambda value: _is_names(value) and "" not in (value or ()), "a list of names"),
    "target_parameters": (lambda value: _is_names(value) and "" not in (value or ()), "a list of names"),
    "rank_pattern": (_is_ranks, "a dict of valid regular expressions and ranks, which are positive ints"),
}
