"""All entries of all tables."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterable
from pathlib import Path

from zoo.entry import Entry


def entries() -> dict[str, Entry]:
    """Name -> entry, of every file here that has a table, by library and name.

    Raises:
        ValueError: a name is used twice.
    """
    found: dict[str, Entry] = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if not file.stem.startswith(("torchvision_", "timm_", "transformers_", "diffusers_")):
            continue
        for entry in importlib.import_module(f"zoo.{file.stem}").ENTRIES:
            if entry.name in found:
                raise ValueError(f"{entry.name}: it is in the tables twice")
            found[entry.name] = entry
    return dict(sorted(found.items()))


def named(patterns: Iterable[str]) -> dict[str, Entry]:
    """The entries whose name, or what follows the library's, fits one of these shell patterns; all where there is none.

    Raises:
        KeyError: a pattern fits nothing.
    """
    every, wanted = entries(), list(patterns)
    if not wanted:
        return every
    chosen = {}
    for pattern in wanted:
        fitting = {n: e for n, e in every.items() if any(fnmatch.fnmatch(x, pattern) for x in (n, n.partition("/")[2]))}
        if not fitting:
            raise KeyError(f"{pattern}: no model of the zoo is called so")
        chosen |= fitting
    return dict(sorted(chosen.items()))
