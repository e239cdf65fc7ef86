"""Suggest names in the error messages of the selection."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

_SHOWN = 8


def suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def suggestion(names: Collection[str] | str, paths: list[str]) -> str:
    """Return a sentence that helps to correct `names`, which do not match any of `paths`."""
    known = {suffix for path in paths for suffix in suffixes(path)}
    if isinstance(names, str):
        if names in known:
            return f"A str must match the full path as a regex. To match the end of a path, use the list [{names!r}]."
        if inside := next((path for path in paths if re.search(names, path)), None):
            return f"A str must match the full path as a regex, but this one matches only a part of {inside!r}."
    elif regex := next((name for name in sorted(names) if any(_is_regex_for(name, path) for path in paths)), None):
        return f"In a list, {regex!r} is a name and not a regex. Use the end of a path, or the str in `target_modules`."
    near: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else sorted(names)[:_SHOWN]:
        alike = [suffix for suffix in known if suffix.count(".") == name.count(".")]
        near |= dict.fromkeys(difflib.get_close_matches(name, alike))
    if not near:
        return f"Available names: {leaf_names(paths)}."
    guesses = [f"[{guess!r}]" if isinstance(names, str) else repr(guess) for guess in near]
    return f"Did you mean {' or '.join(guesses[:_SHOWN])}?"


def _is_regex_for(name: str, path: str) -> bool:
    try:
        return re.fullmatch(name, path) is not None
    except re.error:
        return False


def some_of(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Format the first of several names, and the number of other names.

    >>> some_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def leaf_names(paths: Iterable[str]) -> str:
    """The distinct last components of paths, in order, with block numbers at the end."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    names.sort(key=str.isdigit)
    return some_of([repr(name) for name in names])


def format_names(names: Collection[str] | Collection[int] | str | int | None) -> str:
    r"""Format the value of a field of names as Python code, sorted, and shortened if it is long.

    >>> format_names({"value", "query"})
    "['query', 'value']"
    >>> print(format_names(r"layer\d"))
    r'layer\d'
    """
    if isinstance(names, str) and "\\" in names and "'" not in names and names.isprintable():
        return f"r'{names}'"  # a regex as it was written
    if names is None or isinstance(names, str | int):
        return repr(names)
    entries = sorted(names)
    return repr(entries) if len(entries) <= _SHOWN else f"{entries[:_SHOWN]!r} and {len(entries) - _SHOWN} more"
