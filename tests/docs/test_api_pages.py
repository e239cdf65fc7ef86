"""The reference has every public name once."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import Counter

from documents import DOCS, ROOT
from torch.fx.passes.infra.pass_base import PassBase

import hra_fx
from hra_fx import integrations


def passes() -> set[str]:
    """The passes, each by the name of its module and its own."""
    found = set()
    for file in (ROOT / "passes").glob("[!_]*.py"):
        module = importlib.import_module(f"passes.{file.stem}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, PassBase) and value.__module__ == module.__name__:
                found.add(f"{module.__name__}.{name}")
    return found


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    shown = Counter(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    names = {f"hra_fx.{name}" for name in hra_fx.__all__}
    names |= {f"hra_fx.integrations.{name}" for name in integrations.__all__}
    assert shown == Counter(names | passes())
    assert len(passes()) == 6
