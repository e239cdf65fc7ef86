"""Format names in the error messages of the selection."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

_SHOWN = 8


def suffixes(path: str) -> list[str]:
    """The dotted suffixes of a path, shortest first: "a.b.c" gives "c", "b.c", "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def some_of(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Format the first of several names, and the number of other names.

    >>> some_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def available(paths: Iterable[str]) -> str:
    """A sentence with the distinct last components of paths, in order, with block numbers at the end.

    >>> available(["layers", "layers.0", "layers.0.q"])
    "Available names: 'layers', 'q', '0'. A list has names or ends of paths, and a str is a regex for whole paths."
    """
    names = sorted(dict.fromkeys(path.rpartition(".")[2] for path in paths if path), key=str.isdigit)
    shown = some_of([repr(name) for name in names])
    return f"Available names: {shown}. A list has names or ends of paths, and a str is a regex for whole paths."


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
