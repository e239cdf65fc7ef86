"""Values that a `GraphModule` keeps in addition to its graph, in copies and pickles.

fx's deepcopy keeps `meta` but no other attributes, and a pickle keeps the attributes but not `meta`. So a note is
stored in both.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from hra_fx.compat import call_after_deepcopy

_PREFIX = "_hra_"


def write_note(graph: fx.GraphModule, key: str, value: Any) -> None:
    """Store a value under a key that starts with `_hra_`."""
    if not read_notes(graph):
        call_after_deepcopy(graph, _renew)
    graph.meta[key] = vars(graph)[key] = value


def read_notes(graph: fx.GraphModule) -> dict[str, Any]:
    """All notes by key."""
    return {key: value for key, value in {**graph.meta, **vars(graph)}.items() if str(key).startswith(_PREFIX)}


def _renew(copied: fx.GraphModule) -> None:
    vars(copied).update(read_notes(copied))
