"""`target_modules` that match exactly the adapted layers of a model."""

from __future__ import annotations

import re
from collections.abc import Collection

from hra_fx.selection.suggestions import suffixes


def exact_targets(adapted: Collection[str], modules: Collection[str]) -> list[str] | str:
    """The shortest names that match the adapted layers, and no other module, by PEFT's rules.

    Args:
        adapted: paths of the adapted layers.
        modules: paths of all modules of the model.

    Returns:
        Ends of paths, sorted; or a regular expression, if a path is itself the end of another one.

    Example:
        >>> exact_targets(["a.q", "b.q", "a.k"], ["a", "b", "a.q", "b.q", "a.k", "b.k"])
        ['a.k', 'q']
        >>> exact_targets(["fc"], ["fc", "block", "block.fc"])
        'fc'
    """
    chosen = set(adapted)
    others = {suffix for path in modules if path not in chosen for suffix in suffixes(path)}
    short = {path: next((end for end in suffixes(path) if end not in others), None) for path in adapted}
    if None in short.values():
        return "|".join(re.escape(path) for path in adapted)
    return sorted({end for end in short.values() if end is not None})
