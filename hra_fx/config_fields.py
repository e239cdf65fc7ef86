"""What each field of `HRAConfig` accepts, and hints for keywords that are not fields."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from hra_fx.errors import ConfigError
from hra_fx.patterns import layer_index_regex, rank_regex, saved_module_regex

#: Checks the value of a field with this name, and returns it in the form that is stored.
Check: TypeAlias = Callable[[str, Any], Any]

#: Field -> its values, and what to use instead of others.
_CHOICES = {
    "bias": (("none", "all", "hra_only"), " Use 'hra_only' for the biases of the adapted layers."),
    "peft_type": (("HRA",), " Only HRA can be loaded. Use PEFT for adapters of other methods."),
    "task_type": (
        (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"),
        "",
    ),
}

#: Field -> the expression that an entry is used in; otherwise, it is used as it is.
_USED_IN = {
    "layers_pattern": layer_index_regex,
    "modules_to_save": saved_module_regex,
    "rank_pattern": rank_regex,
}

_NO_ALPHA = "HRA has no alpha, because Q is orthogonal. Remove it. To weaken an adapter, call hra_fx.set_scale."
#: A field of PEFT's `LoraConfig`, and of `HRAConfig` before 0.5.
_TOKENS = "trainable_token_indices"
#: Fields of PEFT's `LoraConfig` without a counterpart.
_ONLY_IN_LORA = {
    "lora_alpha": _NO_ALPHA,
    "alpha_pattern": _NO_ALPHA,
    "use_rslora": _NO_ALPHA,
    "lora_dropout": "HRA has no dropout. Remove it, and set the dropout of the model itself.",
    "lora_bias": "Reflections have no bias. Use bias='hra_only' to train the biases of the adapted layers.",
    "use_dora": "HRA preserves the norm of each row of the weight, so DoRA does not apply. Remove it.",
    _TOKENS: (
        'It was removed in 0.5. To train the embeddings in full, use modules_to_save=["embed_tokens", "lm_head"].'
    ),
    "fan_in_fan_out": "The layout of the weight is inferred from the layer type. Remove it.",
}


def field_hint(name: str, fields: Collection[str]) -> str:
    """Return a sentence that says what to use instead of the unknown field `name`."""
    if name in _ONLY_IN_LORA:
        return _ONLY_IN_LORA[name]
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
    return f"Did you mean `{near[0]}`?" if near else f"The fields are {', '.join(fields)}."


def check_extra(extra: Any, fields: Collection[str]) -> dict[str, Any]:
    """Check the entries of a file that are not fields."""
    if not isinstance(extra, dict) or not all(isinstance(key, str) for key in extra):
        raise ConfigError(f"`extra` must be a dict with str keys, got {extra!r}.")
    if known := next((name for name in fields if name in extra), None):
        raise ConfigError(f"`extra` must not contain the field {known!r}. Pass it as a keyword instead.")
    if extra.get(_TOKENS):
        raise ConfigError(f"HRAConfig has no field `{_TOKENS}`. {_ONLY_IN_LORA[_TOKENS]}")
    return dict(extra)


def check_positive_int(name: str, value: Any) -> int:
    """Check that an argument is a positive int."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"`{name}` must be a positive int, got {value!r}.")
    return value


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"`{name}` must be a bool, got {value!r}.")
    return value


def _choice(name: str, value: Any) -> str | None:
    allowed, hint = _CHOICES[name]
    if value not in allowed:
        expected = f"one of {', '.join(map(repr, allowed))}" if len(allowed) > 1 else repr(allowed[0])
        raise ConfigError(f"`{name}` must be {expected}, got {value!r}.{hint}")
    return None if value is None else str.__str__(value)  # PEFT's enums are strings too


def _strings(name: str, value: Any) -> list[str]:
    """A collection of strings as a list; a set, which has no order, is sorted."""
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    if not is_collection or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"`{name}` must be a str or a list of str, got {value!r}.")
    entries = [str.__str__(entry) for entry in value]
    return sorted(entries) if isinstance(value, set | frozenset) else entries


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or "" in _strings(name, value):
        raise ConfigError(f"`{name}` must be a list of names that are not empty, got {value!r}.")
    return _compiled(name, _strings(name, value))


def _names_or_regex(name: str, value: Any) -> set[str] | str | None:
    if isinstance(value, str):
        return _compiled(name, [str.__str__(value)])[0]
    return None if value is None else set(_strings(name, value))


def _indices(name: str, value: Any) -> list[int] | int | None:
    """None, one index or a list of indices."""
    many = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
    entries: list[Any] = list(value) if many else [] if value is None else [value]
    for entry in entries:
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < 0:
            raise ConfigError(f"`{name}` must be an int >= 0 or a list of them, got {entry!r}.")
    if not many:
        return value  # type: ignore[no-any-return]
    return sorted(entries) if isinstance(value, set | frozenset) else entries


def _layers_pattern(name: str, value: Any) -> list[str] | str | None:
    if isinstance(value, str):
        return _compiled(name, [value])[0]
    return None if value is None else _compiled(name, _strings(name, value))


def _ranks(name: str, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or not all(isinstance(pattern, str) and pattern for pattern in value):
        raise ConfigError(f"`{name}` must be a dict of names and ranks, got {value!r}.")
    for pattern, rank in value.items():
        check_positive_int(f"{name}[{pattern!r}]", rank)
    _compiled(name, list(value))
    return dict(value)


def _compiled(name: str, entries: list[str]) -> list[str]:
    """Check that entries compile in the regular expression that they are used in, and return them."""
    for entry in entries:
        try:
            re.compile(_USED_IN.get(name, str)(entry))
        except re.error as error:
            raise ConfigError(f"`{name}`: {entry!r} is not a valid regular expression: {error}.") from error
    return entries


#: Fields with a check. The method comes first, because files of other methods also differ in other fields.
CHECKS: dict[str, Check] = {
    "peft_type": _choice,
    "task_type": _choice,
    "bias": _choice,
    "r": check_positive_int,
    "inference_mode": _bool,
    "apply_GS": _bool,
    "init_weights": _bool,
    "pairs": _bool,
    "base_model_name_or_path": lambda _, value: None if value is None else os.fspath(value),
    "target_modules": _names_or_regex,
    "exclude_modules": _names_or_regex,
    "layers_to_transform": _indices,
    "layers_pattern": _layers_pattern,
    "modules_to_save": _names,
    "target_parameters": lambda name, value: _names(name, value) or None,
    "rank_pattern": _ranks,
}
