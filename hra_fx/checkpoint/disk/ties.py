"""Untie weights on disk: a changed tensor that transformers ties to another gets its own entry in the file.

As in `hra_fx.fold`, `tie_word_embeddings` becomes False, and everything that it tied is written to the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hra_fx.checkpoint.disk.architecture import IN_MEMORY, Architecture
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.errors import FoldError
from hra_fx.model.tied import TIE_SETTING, reads_tie_setting, ties_when_loaded


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


def untying(architecture: Architecture, names: FileNames, changed: Mapping[str, Tensor | None]) -> Untying:
    """Find out what to untie if some tensors change.

    `changed`: name in the file or in the adapter -> new value, `None` for a rotation.

    Raises:
        FoldError: the tensors cannot be untied.
    """
    model: Any = architecture.model
    if model is None:
        # Models tie embeddings and output layers. These are not in a numbered block.
        outside = [name for name in changed if not any(part.isdigit() for part in name.split("."))]
        if architecture.says_tied and outside:
            raise FoldError(
                f"{architecture.folder / 'config.json'}: {TIE_SETTING} is True, but transformers does not support this "
                f"model, so it is unknown which tensors are tied to {outside[0]}. {IN_MEMORY}"
            )
        return Untying()
    own, groups = _ties(architecture)
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
    return Untying(
        sources,
        {name: called[name] for name in sources if name in called},
        (),
        tuple(configs),
        tuple(dict.fromkeys(type(config).__name__ for config in configs.values() if ties_when_loaded(config))),
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


def tied_to(name: str, architecture: Architecture, names: FileNames) -> str | None:
    """The tensor in the files to which a tensor outside of the files is tied; `None` if unknown.

    `name` is the adapter's name of the tensor.
    """
    if architecture.model is None:
        return None
    own, groups = _ties(architecture)
    found = architecture.lookup(own, name)
    group = next((group for group in groups if found in group), [])
    return next((stored for other in group if (stored := names.find(other))), None)


def _ties(architecture: Architecture) -> tuple[Collection[str], list[list[str]]]:
    """All names in the model, and the names of each tied tensor."""
    model: Any = architecture.model
    return model.state_dict(), _groups(model.get_expanded_tied_weights_keys(all_submodels=True))


def _groups(ties: Mapping[str, str]) -> list[list[str]]:
    """The names of each tied tensor. The other names are tied to the first name."""
    groups: dict[str, list[str]] = {}
    for name, source in ties.items():
        while source in ties:
            source = ties[source]
        groups.setdefault(source, [source]).append(name)
    return list(groups.values())


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
