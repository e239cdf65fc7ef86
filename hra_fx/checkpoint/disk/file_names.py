"""The names in a set of weight files, looked up by the layers of an adapter."""

from __future__ import annotations

from functools import cached_property

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.header import StoredTensor
from hra_fx.checkpoint.disk.naming import IN_MEMORY, Names
from hra_fx.checkpoint.disk.stacked import Place, Source, Stacked, sources_in, stacked_in
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of, stands_for_parameter

WEIGHTS = ("weight", "in_proj_weight")


class FileNames(Names):
    """The names in a set of files.

    Args:
        found: the files.
        architecture: of their folder.
    """

    def __init__(self, found: WeightSet, architecture: Architecture) -> None:
        """Store the arguments; the model is built when a name is not found without it."""
        super().__init__(found.name, found.tensors.keys(), lambda: architecture.prefix)
        self._found, self._architecture = found, architecture

    @cached_property
    def stacked(self) -> dict[str, Stacked]:
        """The 3-D parameters of the model that are in the files, by their names in the model."""
        return stacked_in(self._found.tensors, self._sources, self._architecture)

    @cached_property
    def _sources(self) -> dict[str, list[Source]]:
        return sources_in(self._found.tensors, self._architecture)

    def renamed(self, name: str) -> StoredTensor | None:
        """The tensor that transformers loads under a name that is not in the files; `None` if there is none.

        Raises:
            CheckpointError: it is made of others.
        """
        loaded = Names(self.where, self._sources, self._prefix).find(name)
        if loaded is None:
            return None
        first, *others = self._sources[loaded]
        if others or first.converter is not None or loaded in self.stacked:
            raise CheckpointError(
                f"{first.stored.file}: the adapter replaces {name}, which transformers makes from tensors such as "
                f"{first.stored.name}. {IN_MEMORY}"
            )
        return first.stored

    def parameter(self, path: str) -> str | None:
        """The name in `stacked` of the parameter that an adapter's layer stands for; `None` if it is not there."""
        if not stands_for_parameter(path):
            return None
        return Names(self.where, self.stacked, self._prefix).find(parameter_of(path))

    def weights_of(self, path: str) -> list[Place]:
        """The tensors with the weight of an adapter's layer, of which only experts can have several; empty if none.

        Raises:
            CheckpointError: it is not certain which these are.
        """
        if name := self.find(*(f"{path}.{weight}" for weight in WEIGHTS)):
            return [Place(name)]
        parameter = self.parameter(path)
        return [] if parameter is None else self.stacked[parameter].places(parameter)
