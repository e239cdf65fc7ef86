"""Warn of entries of a configuration that match nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning
from hra_fx.selection.parameter_hints import hint_for
from hra_fx.selection.suggestions import suffixes, suggestion


def warn_unmatched(model: nn.Module, config: HRAConfig, paths: Iterable[str], layers: list[str]) -> None:
    """Warn of each name in `target_modules` that is the end of no path; a regular expression has one part only.

    Args:
        model: the model.
        config: a configuration that selects other layers of it.
        paths: the paths of its modules, all of a shared one.
        layers: the paths of the layers that can be adapted, to suggest names from.

    Warns:
        HRAWarning: the names, with suggestions.
    """
    names = config.target_modules
    # A saved adapter may list the default names of its architecture, of which models have some.
    if names is None or isinstance(names, str) or config.inference_mode:
        return
    known = {suffix for path in paths for suffix in suffixes(path)}
    for name in sorted(set(names) - known):
        hint = hint_for(model, [name]) or suggestion([name], layers)
        text = f"`target_modules`: the entry {name!r} matches no module of {type(model).__name__}. {hint}"
        warnings.warn(text, HRAWarning, stacklevel=4)
