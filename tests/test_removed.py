"""Each removed name and argument raises one error that says what to do, and docs/upgrading.md lists it."""

from __future__ import annotations

from pathlib import Path

import pytest

import hra_fx
from hra_fx import removed

UPGRADING = Path(__file__).resolve().parent.parent / "docs" / "upgrading.md"


@pytest.mark.parametrize("name", removed.NAMES)
def test_a_removed_name_says_what_to_use(name: str) -> None:
    for access in (lambda: getattr(hra_fx, name), lambda: exec(f"from hra_fx import {name}")):
        with pytest.raises(ImportError, match=rf"^hra_fx\.{name} was removed in 0\.5\. [A-Z`].*\.$"):
            access()
    assert name not in hra_fx.__all__
    text = UPGRADING.read_text(encoding="utf-8")
    assert f"`{name}`" in text or f"`{name}(" in text


def test_tables_are_sorted() -> None:
    assert list(removed.NAMES) == sorted(removed.NAMES)
    assert list(removed.ARGUMENTS) == sorted(removed.ARGUMENTS)


def test_removed_arguments_belong_to_functions_that_exist() -> None:
    assert all(getattr(hra_fx, name.split(".")[0]) for name in removed.ARGUMENTS)
