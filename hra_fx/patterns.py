"""Regular expressions that match module paths with the entries of a configuration, by PEFT's rules."""

from __future__ import annotations

import re


def layer_index_regex(pattern: str | None) -> str:
    """A regular expression. Its group `idx` is the first block index in a path after a module list called `pattern`.

    With None, any name matches if there is a component before it, as in PEFT.

    >>> re.match(layer_index_regex("h"), "h.3.mlp")["idx"]
    '3'
    >>> re.match(layer_index_regex(None), "h.3.mlp") is None
    True
    """
    head = r".*?\.[^.]*" if pattern is None else rf"(?:^|.*?\.){pattern}"
    return head + r"\.(?P<idx>\d+)\."


def saved_module_regex(name: str) -> str:
    """A regular expression for the paths that are not adapted because of an entry of `modules_to_save`."""
    return rf"(^|.*\.){name}($|\..*)"


def matches_rank(pattern: str, path: str) -> bool:
    """Whether an entry of `rank_pattern` matches a layer. A 3-D parameter also matches by its own name.

    >>> matches_rank("experts.up_proj", "mlp.experts.hra_up_proj"), matches_rank("proj", "mlp.up_proj")
    (True, False)
    """
    parameter = re.sub(r"(^|\.)hra_([^.]+)$", r"\1\2", path)
    return any(re.match(rf"(.*\.)?({pattern})$", known) for known in (path, parameter))
