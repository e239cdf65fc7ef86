"""The names in a set of weight files, looked up by the layers of an adapter."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.naming import IN_MEMORY, Names
from hra_fx.checkpoint.disk.stacked import LoadedFrom, Stacked, TensorRef, sources_in, stacked_in
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of, stands_for_parameter

WEIGHTS = ("weight", "in_proj_weight")


class FileNames:
    """The names in a set of files, which may differ from those in the model.

    Args:
        found: the files.
        architecture: of their folder.

    Attributes:
        where: the files, for messages.
        loaded: name in the files -> name in the model, of tensors that are loaded as they are.
    """

    def __init__(self, found: WeightSet, architecture: Architecture) -> None:
        """Build the model without weights, if there is one, to see what it loads."""
        self.where = found.name
        self._found, self._architecture = found, architecture
        self._sources: dict[str, list[LoadedFrom]] = sources_in(found.tensors, architecture)
        single = {name: sources[0] for name, sources in self._sources.items() if len(sources) == 1}
        self.loaded = {source.stored.name: name for name, source in single.items() if source.converter is None}
        self._stored = dict(zip(found.tensors, found.tensors, strict=True))
        self._stored |= {name: stored for stored, name in self.loaded.items()}
        self._names = self._lookup(self._stored)

    @cached_property
    def stacked(self) -> dict[str, Stacked]:
        """The 3-D parameters of the model that are in the files, by their names in the model."""
        return stacked_in(self._found.tensors, self._sources, self._architecture)

    def find(self, *names: str) -> str | None:
        """The name in the files of the first of several tensors that is there; see `Names.find`."""
        found = self._names.find(*names)
        return None if found is None else self._stored[found]

    def near(self, name: str) -> str:
        """A sentence with the most similar names."""
        return self._lookup(self._found.tensors).near(name)

    def check_new(self, name: str) -> None:
        """Check that a tensor that is not in the files is not made of those that are.

        Raises:
            CheckpointError: it is.
        """
        if (loaded := self._lookup(self._sources).find(name)) is not None:
            stored = self._sources[loaded][0].stored
            raise CheckpointError(
                f"{stored.file}: the adapter replaces {name}, which transformers makes from tensors such as "
                f"{stored.name}. {IN_MEMORY}"
            )

    def parameter(self, path: str) -> str | None:
        """The name in `stacked` of the parameter that an adapter's layer stands for; `None` if it is not there."""
        return self._lookup(self.stacked).find(parameter_of(path)) if stands_for_parameter(path) else None

    def weights_of(self, path: str) -> list[TensorRef]:
        """The tensors with the weight of an adapter's layer, of which only experts can have several; empty if none.

        Raises:
            CheckpointError: it is not certain which these are.
        """
        if name := self.find(*(f"{path}.{weight}" for weight in WEIGHTS)):
            return [TensorRef(name)]
        parameter = self.parameter(path)
        return [] if parameter is None else self.stacked[parameter].refs(parameter)

    def _lookup(self, present: Collection[str]) -> Names:
        return Names(self.where, present, lambda: self._architecture.prefix)
