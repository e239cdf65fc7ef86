"""`train_pairs` of 0.4, which adapters now do by themselves."""

from __future__ import annotations

import warnings

from hra_fx.errors import HRAWarning


def train_pairs(*args: object, **kwargs: object) -> None:
    """Do nothing: adapters train in pairs by themselves (`HRAConfig(pairs=True)`). Scripts of 0.4 call this function.

    Warns:
        HRAWarning: always, so Python shows it once for each line of a program.
    """
    text = "train_pairs does nothing since 0.5: adapters train in pairs by themselves. Remove the call."
    warnings.warn(text, HRAWarning, stacklevel=2)
