"""Tensors that transformers ties when it loads a checkpoint: one that is changed gets a place of its own in the file.

The policy is that of `hra_fx.fold`: `tie_word_embeddings` goes off, and all that it tied is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.errors import FoldError
from hra_fx.model.untie import Parted, Setting, settings_that_tie, turn_off, turn_on, why_not_off

FLAG = "tie_word_embeddings"


@dataclass(frozen=True)
class Untying:
    """What comes apart.

    Attributes:
        sources: name of a tensor that the file does not have -> that of the one that it is tied to.
        changed: those of them that are changed -> what the caller calls them; the others are written as they are.
        one: what the caller calls tensors that change with what they are tied to, and need no place of their own.
        configs: where in `config.json` the setting goes off: keys down to the object.
        returning: classes of configurations that say that it is on again whenever one is loaded.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, str] = field(default_factory=dict)
    one: Collection[str] = ()
    configs: tuple[tuple[str, ...], ...] = ()
    returning: tuple[str, ...] = ()


def is_in_block(name: str) -> bool:
    """Whether a tensor is in a numbered block, where few models tie anything.

    >>> is_in_block("lm_head.weight"), is_in_block("model.layers.0.mlp.up_proj.weight")
    (False, True)
    """
    return any(part.isdigit() for part in name.split("."))


def untying(architecture: Architecture, names: Names, changed: Mapping[str, Tensor | None]) -> Untying:
    """What comes apart where some tensors are changed.

    Args:
        architecture: of the checkpoint.
        names: those in the file.
        changed: name, in the file or as the adapter has it -> what comes in its place, `None` for one that is rotated.

    Raises:
        FoldError: it cannot come apart.
    """
    model = architecture.model
    if model is None:
        if architecture.says_tied and changed:
            raise FoldError(
                f"{architecture.folder / 'config.json'}: it says {FLAG}, and transformers does not know its model, so "
                f"that what {next(iter(changed))} is tied to cannot be told. Fold it in memory: hra_fx.load_adapter, "
                "then hra_fx.fold."
            )
        return Untying()
    own = Names("config.json", model.state_dict().keys(), lambda: architecture.prefix)
    called = {found: name for name in changed if (found := own.find(name))}
    values = {name: changed[given] for name, given in called.items()}
    settings = settings_that_tie(model, {_place(model, name) for name in called})
    groups = _groups(model, settings)
    touched = [group for group in groups if values.keys() & set(group)]
    if all(_stay_one(group, values) for group in touched):
        return Untying(one=[called[name] for group in touched for name in group])
    if reason := why_not_off(settings):
        raise FoldError(f"{reason}. Leave it out with exclude_modules.")
    sources: dict[str, str] = {}
    for group in groups:
        there = {name: names.find(name) for name in group}
        source = next((found for found in there.values() if found), None)
        if source is not None:
            sources |= {name: source for name, found in there.items() if found is None}
    return Untying(
        sources,
        {name: called[name] for name in sources if name in called},
        (),
        tuple(dict.fromkeys(path for s in settings for c in s.configs for path in _paths(_config(model), c))),
        _returning(settings),
    )


def _returning(settings: list[Setting]) -> tuple[str, ...]:
    """Asked of the configurations with the setting off; then it is on again, for another set of files may ask too."""
    configs = turn_off(settings)
    try:
        return tuple(Parted(settings, {}).returning)
    finally:
        turn_on(configs)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _groups(model: nn.Module, settings: list[Setting]) -> list[list[str]]:
    """Names of what is one tensor, the one that others are tied to first."""
    paths = {module: path for path, module in model.named_modules()}
    groups: list[list[str]] = []
    for pair in (pair for setting in settings for pair in setting.pairs):
        joined = [f"{paths[owner]}.{name}".lstrip(".") for owner, name in reversed(pair)]
        for group in [group for group in groups if set(group) & set(joined)]:
            groups.remove(group)
            joined = list(dict.fromkeys([*group, *joined]))
        groups.append(joined)
    return groups


def _stay_one(group: list[str], changed: Mapping[str, Tensor | None]) -> bool:
    """Whether all of a group get the same values, as where an adapter trained tied embeddings as one."""
    values = [changed.get(name) for name in group]
    first = values[0]
    return first is not None and all(other is not None and first.equal(other) for other in values)


def _config(model: nn.Module) -> Any:
    return model.config


def _paths(config: Any, wanted: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a configuration is in another one; copies that models make for their parts are not in it."""
    if config is wanted:
        yield path
    for key in getattr(config, "sub_configs", {}):
        if (inner := getattr(config, key, None)) is not None:
            yield from _paths(inner, wanted, (*path, key))
