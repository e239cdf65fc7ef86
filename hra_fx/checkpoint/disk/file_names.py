"""Find the names in a set of weight files for the layers of an adapter.

transformers renames, merges and transposes tensors when it loads a checkpoint. Its own list of conversions says which
tensors form a 3-D parameter of a model: one tensor, or one tensor for each expert. Only conversions that keep the
inputs of every expert in one dimension are supported.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

from hra_fx.checkpoint.disk.architecture import IN_MEMORY, Architecture
from hra_fx.checkpoint.disk.stored import StoredTensor, WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import is_transposed, parameter_of, stacked_parameters, stands_for_parameter

WEIGHTS = ("weight", "in_proj_weight")


class TensorRef(NamedTuple):
    """A tensor in a file that a layer adapts.

    Attributes:
        name: the name of the tensor.
        expert: the expert that the weight belongs to; `None` if it contains all experts, or is not for experts.
        columns: for experts, whether the tensor is `(..., in, out)`; `None` if unknown, and for other layers.
    """

    name: str
    expert: int | None = None
    columns: bool | None = None


class LoadedFrom(NamedTuple):
    """A tensor in a file that a tensor of a model is loaded from.

    Attributes:
        stored: the tensor in the file.
        converter: transformers' `WeightConverter` that creates the model's tensor; `None` if it is the same tensor.
        pattern: the converter's pattern that matches the name in the file.
    """

    stored: StoredTensor
    converter: Any = None
    pattern: str | None = None


class Stacked(NamedTuple):
    """A 3-D parameter and its tensors in the files.

    Attributes:
        shape: its shape in the model.
        columns: whether it is `(experts, in, out)` in the model; `None` if unknown.
        sources: the tensors that it is loaded from, in the order in which they are merged.
    """

    shape: tuple[int, ...]
    columns: bool | None
    sources: list[LoadedFrom]

    @property
    def converter(self) -> Any:
        """transformers' `WeightConverter` for it; `None` if it is a single tensor in the files, with any name."""
        return self.sources[0].converter

    def refs(self, parameter: str) -> list[TensorRef]:
        """The tensors of the parameter. Those of one expert have the same inputs, and are in the order of its outputs.

        Raises:
            CheckpointError: the conversion is not supported, or tensors are missing.
        """
        patterns: list[str | None] = [None] if self.converter is None else self.converter.source_patterns
        first = self.sources[0].stored
        operations = [] if self.converter is None else list(self.converter.operations)
        merges = bool(operations) and _is(operations[0], "MergeModulelist", dim=0)
        expected = self.shape[0] if merges else 1
        matching = {pattern: [each.stored for each in self.sources if each.pattern == pattern] for pattern in patterns}
        if any(len(found) != expected for found in matching.values()):
            counts = ", ".join(f"{len(found)} for {pattern or parameter}" for pattern, found in matching.items())
            raise CheckpointError(
                f"{first.file}: {parameter} consists of {expected} tensors of each kind, but the checkpoint has "
                f"{counts}. Download it again."
            )
        columns = self.columns
        if self.converter is not None:
            columns = self._layout(parameter, operations[merges:], len(patterns), first)
        return [
            TensorRef(stored.name, expert if merges else None, columns)
            for pattern in patterns
            for expert, stored in enumerate(matching[pattern])
        ]

    def _layout(self, parameter: str, operations: list[Any], parts: int, first: StoredTensor) -> bool:
        """Whether the tensors are `(..., in, out)` before the operations that follow the merge of experts."""
        if self.columns is not None and len(self.converter.target_patterns) == 1:
            last = operations[0] if len(operations) == 1 else None
            if (not operations or _is(last, "Force16BytesAlignment")) and parts == 1:
                return self.columns
            if _is(last, "Concatenate", dim=2 if self.columns else 1):
                return self.columns
            if _is(last, "Transpose", dim0=1, dim1=2) and parts == 1 and len(first.shape) == 3:
                kept = getattr(last, "check_dims", False) and first.shape == self.shape
                return self.columns if kept else not self.columns
        steps = ", ".join(type(operation).__name__ for operation in self.converter.operations)
        raise CheckpointError(
            f"{first.file}: transformers creates {parameter} from tensors such as {first.name} by {steps}, and it is "
            f"unknown which of their dimensions are the inputs of the experts. {IN_MEMORY}"
        )


def sources_in(tensors: Mapping[str, StoredTensor], architecture: Architecture) -> dict[str, list[LoadedFrom]]:
    """Name of a tensor in a model -> the tensors that it is loaded from; empty if transformers has no such model."""
    model: Any = architecture.model
    if model is None:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state: dict[str, Any] = model.state_dict()
    found: dict[str, list[LoadedFrom]] = {}
    # In the order of transformers, which is the order of the experts.
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        converter = None if pattern is None else by_pattern[pattern]
        first, *others = ("",) if converter is None else converter.target_patterns
        for target in (first, *others):  # the first one has the name
            found.setdefault(name.replace(first, target, 1), []).append(LoadedFrom(tensors[key], converter, pattern))
    return found


def stacked_in(
    tensors: Mapping[str, StoredTensor], sources: Mapping[str, list[LoadedFrom]], architecture: Architecture
) -> dict[str, Stacked]:
    """The 3-D parameters of a model that are in these files, by their names in the model.

    If transformers does not support the model, these are the 3-D tensors of the files.
    """
    model = architecture.model
    if model is None:
        return {
            name: Stacked(stored.shape, None, [LoadedFrom(stored)])
            for name, stored in tensors.items()
            if len(stored.shape) == 3
        }
    return {
        name: Stacked(tuple(getattr(owner, last).shape), is_transposed(owner), sources[name])
        for path, owner, last in stacked_parameters(model)
        if (name := f"{path}.{last}".lstrip(".")) in sources
    }


def _is(operation: Any, kind: str, **fields: int) -> bool:
    """Whether an operation of transformers has a type and these fields."""
    return type(operation).__name__ == kind and all(getattr(operation, key) == value for key, value in fields.items())


class FileNames:
    """The names in a set of files, which may differ from the names in the model.

    Attributes:
        loaded: name in the files -> name in the model, for tensors that are loaded without conversion.
    """

    def __init__(self, found: WeightSet, architecture: Architecture) -> None:
        """Build the model without weights, if possible, to find out what it loads."""
        self._found, self._architecture = found, architecture
        self._sources: dict[str, list[LoadedFrom]] = sources_in(found.tensors, architecture)
        single = {name: sources[0] for name, sources in self._sources.items() if len(sources) == 1}
        self.loaded = {source.stored.name: name for name, source in single.items() if source.converter is None}
        self._stored = dict(zip(found.tensors, found.tensors, strict=True))
        self._stored |= {name: stored for stored, name in self.loaded.items()}

    @cached_property
    def stacked(self) -> dict[str, Stacked]:
        """The 3-D parameters of the model that are in the files, by their names in the model."""
        return stacked_in(self._found.tensors, self._sources, self._architecture)

    def find(self, *names: str) -> str | None:
        """The name in the files of the first of several tensors that exists; see `Architecture.lookup`."""
        found = self._architecture.lookup(self._stored, *names)
        return None if found is None else self._stored[found]

    def near(self, name: str) -> str:
        """Return a sentence with the most similar names."""
        last = ".".join(name.split(".")[-3:])
        same_end = [other for other in self._found.tensors if other.endswith(f".{last}")]
        names = (same_end or difflib.get_close_matches(name, self._found.tensors))[:3]
        return f"Similar names: {', '.join(names)}." if names else "No name is similar."

    def check_new(self, name: str) -> None:
        """Check that transformers does not create a tensor that is not in the files from other tensors.

        Raises:
            CheckpointError: transformers creates it from other tensors.
        """
        if (loaded := self._architecture.lookup(self._sources, name)) is not None:
            stored = self._sources[loaded][0].stored
            raise CheckpointError(
                f"{stored.file}: the adapter replaces {name}, which transformers creates from tensors such as "
                f"{stored.name}. {IN_MEMORY}"
            )

    def parameter(self, path: str) -> str | None:
        """The name in `stacked` of the parameter that an adapter's layer represents; `None` if it does not exist."""
        return self._architecture.lookup(self.stacked, parameter_of(path)) if stands_for_parameter(path) else None

    def weights_of(self, path: str) -> list[TensorRef]:
        """The tensors with the weight of an adapter's layer. Only experts can have several; empty if there are none.

        Raises:
            CheckpointError: the tensors cannot be determined.
        """
        if name := self.find(*(f"{path}.{weight}" for weight in WEIGHTS)):
            return [TensorRef(name)]
        parameter = self.parameter(path)
        return [] if parameter is None else self.stacked[parameter].refs(parameter)
