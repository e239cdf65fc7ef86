"""Find the names in a set of weight files for the layers of an adapter, and untie weights.

transformers renames, merges and transposes tensors when it loads a checkpoint. Its own list of conversions says which
tensors form a 3-D parameter of a model: one tensor, or one tensor for each expert. Only conversions that keep the
inputs of every expert in one dimension are supported.

A changed tensor that transformers ties to another gets its own entry in the file. As in `hra_fx.fold`,
`tie_word_embeddings` becomes False, and everything that it tied is written to the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from hra_fx.checkpoint.disk.architecture import IN_MEMORY, Architecture
from hra_fx.checkpoint.disk.stored import StoredTensor, WeightSet
from hra_fx.compat import require
from hra_fx.errors import CheckpointError, FoldError
from hra_fx.layers.experts_weight import is_transposed, parameter_of, stacked_parameters, stands_for_parameter
from hra_fx.model.tied import TIE_SETTING, reads_tie_setting, ties_when_loaded

WEIGHTS = ("weight", "in_proj_weight")


class TensorRef(NamedTuple):
    """A tensor in a file with the weight of an adapted layer, or with a part of it.

    `expert` is the index of the expert that the tensor belongs to; `None` if it has all experts, or the layer has none.
    For experts, `columns` says whether the tensor is `(..., in, out)`; `None` if unknown.
    """

    name: str
    expert: int | None = None
    columns: bool | None = None


class LoadedFrom(NamedTuple):
    """A tensor in a file from which transformers loads a tensor of a model.

    `converter` is transformers' `WeightConverter` that creates the model's tensor, and `pattern` its pattern that
    matches the name in the file; both are `None` if it is the same tensor.
    """

    stored: StoredTensor
    converter: Any = None
    pattern: str | None = None


class Stacked(NamedTuple):
    """A 3-D parameter, and the tensors that it is loaded from, in the order in which they are merged.

    `columns` says whether it is `(experts, in, out)` in the model; `None` if unknown.
    """

    shape: tuple[int, ...]
    columns: bool | None
    sources: list[LoadedFrom]

    @property
    def converter(self) -> Any:
        """transformers' `WeightConverter` for it; `None` if it is a single tensor in the files, with any name."""
        return self.sources[0].converter

    def refs(self, parameter: str) -> list[TensorRef]:
        """The tensors of the parameter. Those of one expert have the same inputs, in the order of its outputs."""
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


def _sources_in(tensors: Mapping[str, StoredTensor], architecture: Architecture) -> dict[str, list[LoadedFrom]]:
    """Name of a tensor in a model -> the tensors that it is loaded from; empty if transformers has no such model."""
    model: Any = architecture.model
    if model is None:
        return {}
    require("a transformers checkpoint on disk")
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
        for target in (first, *others):  # transformers returns the name for the first target
            found.setdefault(name.replace(first, target, 1), []).append(LoadedFrom(tensors[key], converter, pattern))
    return found


def _is(operation: Any, kind: str, **fields: int) -> bool:
    """Whether an operation of transformers has a type and these fields."""
    return type(operation).__name__ == kind and all(getattr(operation, key) == value for key, value in fields.items())


class FileNames:
    """The names in a set of files, which may differ from the names in the model.

    `loaded` has name in the files -> name in the model, for tensors that are loaded without conversion.
    """

    def __init__(self, found: WeightSet, architecture: Architecture) -> None:
        """Build the model without weights, if possible, to find out what it loads."""
        self.found, self.architecture = found, architecture
        self._sources: dict[str, list[LoadedFrom]] = _sources_in(found.tensors, architecture)
        single = {name: sources[0] for name, sources in self._sources.items() if len(sources) == 1}
        self.loaded = {source.stored.name: name for name, source in single.items() if source.converter is None}
        self._stored = dict(zip(found.tensors, found.tensors, strict=True))
        self._stored |= {name: stored for stored, name in self.loaded.items()}

    @cached_property
    def stacked(self) -> dict[str, Stacked]:
        """The 3-D parameters of the model that are in the files, by their names in the model.

        If transformers does not support the model, these are the 3-D tensors of the files.
        """
        model = self.architecture.model
        if model is None:
            found = self.found.tensors.items()
            return {
                name: Stacked(stored.shape, None, [LoadedFrom(stored)])
                for name, stored in found
                if len(stored.shape) == 3
            }
        return {
            name: Stacked(tuple(getattr(owner, last).shape), is_transposed(owner), self._sources[name])
            for path, owner, last in stacked_parameters(model)
            if (name := f"{path}.{last}".lstrip(".")) in self._sources
        }

    def find(self, *names: str) -> str | None:
        """The name in the files of the first of several tensors that exists; see `Architecture.lookup`."""
        found = self.architecture.lookup(self._stored, *names)
        return None if found is None else self._stored[found]

    def stored(self, name: str) -> StoredTensor | None:
        """A tensor by its name in an adapter, or the tensor that it is tied to; `None` if it is unknown."""
        found = self.find(name)
        if found is None and self.architecture.model is not None:
            own, groups = _ties(self.architecture)
            known = self.architecture.lookup(own, name)
            group = next((group for group in groups if known in group), [])
            found = next((tied for other in group if (tied := self.find(other))), None)
        return None if found is None else self.found.tensors[found]

    def is_converted(self, name: str) -> bool:
        """Whether transformers creates a tensor from tensors with other names."""
        return self.architecture.lookup(self._sources, name) is not None

    def parameter(self, path: str) -> str | None:
        """The name in `stacked` of the parameter that an adapter's layer represents; `None` if it does not exist."""
        return self.architecture.lookup(self.stacked, parameter_of(path)) if stands_for_parameter(path) else None

    def weights_of(self, path: str) -> list[TensorRef]:
        """The tensors with the weight of an adapter's layer. Only experts can have several; empty if there are none."""
        if name := self.find(*(f"{path}.{weight}" for weight in WEIGHTS)):
            return [TensorRef(name)]
        parameter = self.parameter(path)
        return [] if parameter is None else self.stacked[parameter].refs(parameter)


@dataclass(frozen=True)
class Untying:
    """Tensors to untie.

    Attributes:
        sources: name of a tensor that is not in the file -> name of the tensor that it is tied to.
        changed: name of such a tensor that changes -> the caller's name for it; the others are written unchanged.
        stay_tied: the caller's names of tensors that change together with the tensor that they are tied to.
        configs: the objects in `config.json` in which `tie_word_embeddings` becomes False, each as a tuple of keys.
        retied_by: configuration classes that set it to True again when they are loaded, such as T5's.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    stay_tied: Collection[str] = ()
    configs: tuple[tuple[str, ...], ...] = ()
    retied_by: tuple[str, ...] = ()


def untying(names: FileNames, changed: Mapping[str, Tensor | None]) -> Untying:
    """Find out what to untie if some tensors change.

    `changed`: name in the file or in the adapter -> new value, `None` for a rotation.
    """
    architecture = names.architecture
    model: Any = architecture.model
    if model is None:
        _refuse_unknown_ties(architecture, changed)
        return Untying()
    own, groups = _ties(architecture)
    # Name in the model -> the caller's name.
    called = {found: name for name in changed if (found := architecture.lookup(own, names.loaded.get(name, name)))}
    values = {name: changed[given] for name, given in called.items()}
    touched = [group for group in groups if values.keys() & set(group)]
    if all(_same_values(group, values) for group in touched):
        return Untying(stay_tied=[called[name] for group in touched for name in group])
    if reads_tie_setting(model):
        raise FoldError(
            f"{type(model).__name__}.forward depends on config.{TIE_SETTING}, so the output layer cannot be untied "
            "from the embeddings. Leave it out with exclude_modules."
        )
    sources: dict[str, str] = {}
    for group in groups:
        stored = {name: names.find(name) for name in group}
        source = next((found for found in stored.values() if found), None)
        if source is not None:
            sources |= {name: source for name, found in stored.items() if found is None}
    configs = {path: config for path, config in _config_tree(model.config) if getattr(config, TIE_SETTING, False)}
    retied = (type(config).__name__ for config in configs.values() if ties_when_loaded(config))
    return Untying(
        sources=sources,
        changed={name: called[name] for name in sources if name in called},
        configs=tuple(configs),
        retied_by=tuple(dict.fromkeys(retied)),
    )


def _refuse_unknown_ties(architecture: Architecture, changed: Iterable[str]) -> None:
    # Models tie embeddings and output layers. These are not in a numbered block.
    outside = [name for name in changed if not any(part.isdigit() for part in name.split("."))]
    if outside and f'"{TIE_SETTING}": true' in json.dumps(architecture.entries):
        raise FoldError(
            f"{architecture.folder / 'config.json'}: {TIE_SETTING} is True, but transformers does not support this "
            f"model, so it is unknown which tensors are tied to {outside[0]}. {IN_MEMORY}"
        )


def untied_config(architecture: Architecture, paths: Sequence[tuple[str, ...]]) -> bytes:
    """The content of `config.json` with tied embeddings turned off."""
    entries: dict[str, Any] = json.loads(json.dumps(architecture.entries))
    for path in paths:
        place = entries
        for key in path:
            place = place.setdefault(key, {})
        place[TIE_SETTING] = False
    return (json.dumps(entries, indent=2, ensure_ascii=False) + "\n").encode()


def _ties(architecture: Architecture) -> tuple[Collection[str], list[list[str]]]:
    """All names in the model, and the names of each tied tensor. The other names are tied to the first name."""
    model: Any = architecture.model
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups: dict[str, list[str]] = {}
    for name, source in ties.items():
        while source in ties:  # tied in an inner model
            source = ties[source]
        groups.setdefault(source, [source]).append(name)
    return model.state_dict(), list(groups.values())


def _same_values(group: list[str], changed: Mapping[str, Tensor | None]) -> bool:
    """Whether all tensors of a group get the same values, because an adapter trained tied embeddings as one tensor."""
    values = [changed.get(name) for name in group]
    first = values[0]
    return first is not None and all(other is not None and first.equal(other) for other in values)


def _config_tree(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for key in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, key, None)) is not None:
            yield from _config_tree(inner, (*path, key))
