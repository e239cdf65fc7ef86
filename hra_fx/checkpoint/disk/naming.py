"""Match names of an adapter, a checkpoint and a model, which may differ by the prefix of models with a head."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

from hra_fx.errors import CheckpointError

#: What to do where the files do not say enough.
IN_MEMORY = "Load the model instead: hra_fx.load_adapter, then hra_fx.fold or hra_fx.save_as_lora."
_NEAR = 3


class Names:
    """Names in a checkpoint, looked up by names of an adapter or a model.

    Args:
        where: the checkpoint, for messages.
        present: the names.
        prefix: returns the prefix, such as "bert."; called only if a name is not found without it.
    """

    def __init__(self, where: str, present: Collection[str], prefix: Callable[[], str]) -> None:
        """Store the arguments."""
        self.where = where
        self.present = present
        self._prefix = prefix

    def find(self, *names: str) -> str | None:
        """The first of several names that exists, also with the prefix added or removed.

        Raises:
            CheckpointError: several exist.

        >>> Names("x", {"encoder.weight"}, lambda: "bert.").find("bert.encoder.weight")
        'encoder.weight'
        """
        found = [name for name in names if name in self.present] or [
            spelling for name in names for spelling in self._spellings(name) if spelling in self.present
        ]
        if len(found) > 1:
            raise CheckpointError(
                f"{self.where}: {names[0]} is ambiguous: {' and '.join(found)} both exist. {IN_MEMORY}"
            )
        return found[0] if found else None

    def near(self, name: str) -> str:
        """A sentence with the most similar names."""
        close = difflib.get_close_matches(name, self.present, n=_NEAR, cutoff=0.6)
        last = ".".join(name.split(".")[-3:])
        same_end = [other for other in self.present if other.endswith(f".{last}")][:_NEAR]
        names = list(dict.fromkeys([*same_end, *close]))[:_NEAR]
        return f"Similar names: {', '.join(names)}." if names else "No name is similar."

    def _spellings(self, name: str) -> list[str]:
        prefix = self._prefix()
        if not prefix:
            return []
        return [name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"]
