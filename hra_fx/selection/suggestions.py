"""Suggest names in the error messages of the selection."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

_SHOWN = 8


def suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def suggestion(names: Collection[str] | str, paths: Iterable[str]) -> str:
    """Return a sentence that helps to correct `names`, which do not match any of `paths`."""
    known = list(dict.fromkeys(path.rpartition(".")[2] for path in paths if path))
    given = [names] if isinstance(names, str) else sorted(names)[:_SHOWN]
    near = dict.fromkeys(guess for name in given for guess in difflib.get_close_matches(name, known))
    if isinstance(names, str):
        rule, guesses = "A str must match the full path as a regex. ", [f"[{guess!r}]" for guess in near]
    else:
        rule, guesses = "", [repr(guess) for guess in near]
    if not near:
        return f"{rule}Available names: {leaf_names(known)}. A list contains names or ends of paths, not regexes."
    return f"{rule}Did you mean {' or '.join(guesses[:_SHOWN])}?"


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
