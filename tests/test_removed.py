"""Each removed name and argument raises one error that says what to do, and docs/upgrading.md lists it."""

from __future__ import annotations

import importlib
import operator
import re
from pathlib import Path

import pytest
from torch import nn

import hra_fx
from hra_fx import removed

PAIRS = [(name, argument) for name, gone in removed.ARGUMENTS.items() for argument in gone]
UPGRADING = Path(__file__).resolve().parent.parent / "docs" / "upgrading.md"


@pytest.mark.parametrize("name", removed.NAMES)
def test_a_removed_name_says_what_to_use(name: str) -> None:
    owner, _, last = f"hra_fx.{name}".rpartition(".")
    module = importlib.import_module(owner)
    for access in (lambda: getattr(module, last), lambda: exec(f"from {owner} import {last}")):
        with pytest.raises(ImportError, match=rf"^hra_fx\.{name} was removed in 0\.5\. [A-Z`].*\.$"):
            access()
    assert last not in module.__all__
    assert re.search(rf"`{name}[`(]", UPGRADING.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["delete_adapters", "set_adapters"])
def test_a_removed_method_says_what_to_use(name: str) -> None:
    """diffusers has methods with these names, which would do nothing."""

    class Base(nn.Sequential):
        save_pretrained = print

    model = hra_fx.transform(Base(nn.Linear(4, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(AttributeError, match=rf"^hra_fx\.{name} was removed in 0\.5\. Call hra_fx\."):
        getattr(model, name)()


def test_tables_are_sorted() -> None:
    assert list(removed.NAMES) == sorted(removed.NAMES)
    assert list(removed.ARGUMENTS) == sorted(removed.ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), PAIRS)
def test_a_removed_argument_says_what_to_use(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}: `{argument}` was removed in 0\.5\. [A-Z`].*\.$"):
        operator.attrgetter(name)(hra_fx)(**{argument: True})
