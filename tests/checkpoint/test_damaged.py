"""Damaged adapter files are refused by file and key, before the model is changed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import mlp
from checkpoint.damaging import (
    CONFIG_NAME,
    MODELS,
    PREFIX,
    WEIGHTS_NAME,
    refused,
    saved,
    weights,
    with_config,
    with_metadata,
    with_weights,
)
from torch import Tensor

import hra_fx
from hra_fx import CheckpointError, ConfigError

FIRST, LAST = f"{PREFIX}0.hra_u", f"{PREFIX}3.hra_u"
VECTORS = f"{PREFIX}0.hra_vectors"
HEAD, HEAD_BIAS = f"{PREFIX}3.weight", f"{PREFIX}3.bias"

# What was saved: targets, and fields of the configuration.
Saved = tuple[tuple[str, ...], dict[str, Any]]
CHAIN: Saved = (("0", "3"), {"r": 4})
ANCHORED: Saved = (("0",), {"r": 3})
GRAM_SCHMIDT: Saved = (("0",), {"r": 3, "apply_GS": True})
WITH_HEAD: Saved = (("0",), {"r": 2, "modules_to_save": ["3"]})


def text_in(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[:-7])


def only_a_pickle(folder: Path) -> None:
    torch.save(weights(folder), folder / "adapter_model.bin")
    (folder / WEIGHTS_NAME).unlink()


def put(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return with_weights(lambda tensors: tensors.update({key: tensor}))


def poke(key: str, value: float) -> Callable[[Path], None]:
    return with_weights(lambda tensors: tensors[key].view(-1)[1].fill_(value))


def drop(key: str) -> Callable[[Path], None]:
    return with_weights(lambda tensors: tensors.pop(key))


def seven_more(tensors: dict[str, Tensor]) -> None:
    tensors |= {f"{PREFIX}deeper.{i}.hra_u": torch.ones(6, 4) for i in range(7)}


CUT = "truncated, damaged, or not a safetensors file"
DIVERGED = "values that are infinite or NaN"
INT, NAN, INF = torch.int64, float("nan"), float("inf")


def shape(key: str, found: object, expected: object) -> str:
    return f"{key} must have shape {expected}, got {found}."


def not_floating(key: str) -> str:
    return f"'{key}' must have a floating-point dtype, got torch.int64"


#: What was saved, how it is damaged, and the message.
Damage = tuple[Saved, Callable[[Path], object], str]
WEIGHTS: dict[str, Damage] = {
    "cut short": (CHAIN, cut, CUT),
    "a text": (CHAIN, text_in(WEIGHTS_NAME, "not found"), CUT),
    "no weights": (CHAIN, lambda folder: (folder / WEIGHTS_NAME).unlink(), "no such file"),
    # the vectors
    "rank": (CHAIN, put(FIRST, torch.ones(6, 2)), shape(FIRST, (6, 2), (6, 4))),
    "width": (CHAIN, put(LAST, torch.ones(6, 4)), shape(LAST, (6, 4), (8, 4))),
    "nan": (CHAIN, poke(LAST, NAN), f"'{LAST}' has 1 of 32 {DIVERGED}"),
    "inf": (CHAIN, poke(FIRST, -INF), f"'{FIRST}' has 1 of 24 {DIVERGED}"),
    "integers": (CHAIN, put(FIRST, torch.ones(6, 4, dtype=INT)), not_floating(FIRST)),
    # the keys
    "missing": (CHAIN, drop(LAST), f"does not fit Sequential: missing keys {LAST}."),
    "unexpected": (
        CHAIN,
        put(f"{PREFIX}2.hra_u", torch.ones(8, 4)),
        f"does not fit Sequential: unexpected keys {PREFIX}2.hra_u.",
    ),
    "many unexpected": (
        CHAIN,
        with_weights(seven_more),
        ", ".join(f"{PREFIX}deeper.{i}.hra_u" for i in range(5)) + " and 2 more.",
    ),
    # modules to save
    "no head": (
        WITH_HEAD,
        with_weights(lambda tensors: (tensors.pop(HEAD), tensors.pop(HEAD_BIAS))),
        f"missing keys {HEAD_BIAS}, {HEAD}.",
    ),
    "shape of the head": (WITH_HEAD, put(HEAD, torch.ones(5, 8)), shape(HEAD, (5, 8), (4, 8))),
    "head of integers": (
        WITH_HEAD,
        put(HEAD, torch.ones(4, 8, dtype=torch.int32)),
        f"{HEAD} must have a dtype like the model's torch.float32, got torch.int32.",
    ),
    # the vectors before Gram-Schmidt
    "no vectors": (GRAM_SCHMIDT, drop(VECTORS), f"missing key {VECTORS}, the vectors before Gram-Schmidt."),
    "shape of the vectors": (GRAM_SCHMIDT, put(VECTORS, torch.ones(6, 6)), shape(VECTORS, (6, 6), (6, 3))),
    # a configuration that does not match the weights
    "another rank": (CHAIN, with_config(r=8), shape(FIRST, (6, 4), (6, 8))),
    "fewer targets": (
        CHAIN,
        with_config(target_modules=["0"]),
        f"unexpected keys {LAST}. Was the adapter trained on another base model, or its configuration edited?",
    ),
    "more targets": (ANCHORED, with_config(target_modules=["0", "3"]), f"missing keys {LAST}."),
    "Gram-Schmidt of an anchored adapter": (
        ANCHORED,
        with_config(apply_GS=True),
        "does not match r=4, apply_GS=True in the configuration. The two files are from different adapters",
    ),
}
CONFIGS: dict[str, Damage] = {
    "no JSON": (CHAIN, text_in(CONFIG_NAME, "r: 4\n"), "JSON"),
    "JSON of a list": (CHAIN, text_in(CONFIG_NAME, "[]"), "JSON"),
    "another method": (CHAIN, with_config(peft_type="LORA", lora_alpha=8), "'LORA'"),
    "no rank": (CHAIN, with_config(r=0), "r"),
    "targets that do not compile": (CHAIN, with_config(target_modules="("), "'(' is not a valid regular expression"),
}
OTHERS: dict[str, tuple[Saved, Callable[[Path], object], str, str]] = {
    "only a pickle": (CHAIN, only_a_pickle, "adapter_model.bin", "pickle files are never read"),
    "no configuration": (CHAIN, lambda folder: (folder / CONFIG_NAME).unlink(), CONFIG_NAME, "no such file"),
    "other targets": (
        CHAIN,
        with_config(target_modules=["query"]),
        "",
        "the configuration does not fit Sequential: `target_modules=['query']` matches no module of Sequential",
    ),
}
#: Name, what was saved, how it is damaged, the named file, the message, the type of the error.
DAMAGES: dict[str, tuple[Saved, Callable[[Path], object], str, str, type[Exception]]] = {
    **{name: (before, act, WEIGHTS_NAME, text, CheckpointError) for name, (before, act, text) in WEIGHTS.items()},
    **{name: (before, act, CONFIG_NAME, text, ConfigError) for name, (before, act, text) in CONFIGS.items()},
    **{name: (*case, CheckpointError) for name, case in OTHERS.items()},
}
#: Each damage is loaded into one kind of model, in turns.
CASES = [
    pytest.param(state, *damage, id=f"{name}, {state}")
    for (name, damage), state in zip(DAMAGES.items(), itertools.cycle(MODELS), strict=False)
]


def damaged(folder: Path, before: Saved, damage: Callable[[Path], object]) -> tuple[Path, Path]:
    """The folder of an undamaged adapter, and that of a damaged one."""
    targets, fields = before
    whole = saved(folder / "whole", *targets, **fields)
    shutil.copytree(whole, folder / "damaged")
    damage(folder / "damaged")
    return whole, folder / "damaged"


@pytest.mark.parametrize(("state", "before", "damage", "file", "reason", "kind"), CASES)
def test_damage_is_refused_and_leaves_the_model_unchanged(
    state: str,
    before: Saved,
    damage: Callable[[Path], object],
    file: str,
    reason: str,
    kind: type[Exception],
    tmp_path: Path,
) -> None:
    whole, folder = damaged(tmp_path, before, damage)
    model = MODELS[state](whole)
    message = refused(lambda model: hra_fx.load_adapter(model, folder, is_trainable=True), model, kind)
    assert message.startswith(f"{folder / file}: ")
    assert reason in message
    hra_fx.load_adapter(model, whole)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("three", id="no JSON"),
        pytest.param('{"r": 3, "anchor": 1}', id="incomplete"),
        pytest.param('{"r": 5, "apply_GS": false, "anchor": 1}', id="of another adapter"),
    ],
)
def test_damaged_metadata_is_refused(text: str, tmp_path: Path) -> None:
    _, folder = damaged(tmp_path, ANCHORED, with_metadata(text))
    message = refused(lambda model: hra_fx.load_adapter(model, folder), mlp(), CheckpointError)
    assert message.startswith(
        f"{folder / WEIGHTS_NAME}: the metadata hra_fx={text[:80]!r} does not match r=4, apply_GS=False"
    )
