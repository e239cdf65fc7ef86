"""Names of an adapter, of a checkpoint and of its model: the same, but for the prefix that a model with a head has."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

from hra_fx.errors import CheckpointError

_NEAR = 3


class Names:
    """The names in a checkpoint, to be found by those of an adapter or of a model.

    Args:
        where: for messages.
        present: the names.
        prefix: gives the prefix, and is asked only where a name is not found as it is: "bert." of `bert.encoder...`.
    """

    def __init__(self, where: str, present: Collection[str], prefix: Callable[[], str]) -> None:
        """Nothing is looked up yet."""
        self.where = where
        self.present = present
        self._prefix = prefix

    def find(self, *names: str) -> str | None:
        """The one name that is there, of some, as they are or with or without the prefix.

        Raises:
            CheckpointError: several are.

        >>> Names("x", {"encoder.weight"}, lambda: "bert.").find("bert.encoder.weight")
        'encoder.weight'
        """
        found = [name for name in names if name in self.present] or [
            spelling for name in names for spelling in self._spellings(name) if spelling in self.present
        ]
        if len(found) > 1:
            raise CheckpointError(
                f"{self.where}: {names[0]} may be {' or '.join(found)}, which are both there. Load the model and fold "
                "it in memory: hra_fx.load_adapter, then hra_fx.fold."
            )
        return found[0] if found else None

    def near(self, name: str) -> str:
        """What to say of a name that is not there."""
        close = difflib.get_close_matches(name, self.present, n=_NEAR, cutoff=0.6)
        last = ".".join(name.split(".")[-3:])
        same_end = [other for other in self.present if other.endswith(f".{last}")][:_NEAR]
        names = list(dict.fromkeys([*same_end, *close]))[:_NEAR]
        return f"The nearest names are {', '.join(names)}" if names else "No name is like it"

    def _spellings(self, name: str) -> list[str]:
        prefix = self._prefix()
        if not prefix:
            return []
        return [name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"]
