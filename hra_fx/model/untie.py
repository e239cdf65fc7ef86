"""Parting weights that share memory: the folded one gets its own, and transformers is told not to tie it again.

transformers ties by a configuration's `tie_word_embeddings`, when a model is loaded and whenever `tie_weights` is
called. One such setting may tie several pairs (an encoder's and a decoder's embeddings, a head's bias): once it is off,
a file has to hold each of them, so each gets memory of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.trained_copies import BASE, held_by
from hra_fx.model.base_view import laid_bare
from hra_fx.sources import reached_methods

#: (layer, name of its tensor).
Place: TypeAlias = tuple[nn.Module, str]
_FLAG = "tie_word_embeddings"


class Setting(NamedTuple):
    """What one model of transformers ties by its configuration.

    Attributes:
        path: where it is in the whole model.
        model: the model.
        configs: those that say so: its own, and that of its text part, which overrules it when a file is loaded.
        pairs: what is tied, and to what.
    """

    path: str
    model: nn.Module
    configs: tuple[Any, ...]
    pairs: list[tuple[Place, Place]]


class Parted(NamedTuple):
    """What gets memory of its own because a setting goes off.

    Attributes:
        settings: those that go off.
        tensors: name in the whole model -> (layer, name of its tensor, its own parameter).
    """

    settings: list[Setting]
    tensors: dict[str, tuple[nn.Module, str, nn.Parameter]]

    @property
    def returning(self) -> list[str]:
        """Classes of configurations that say yes again whenever one is loaded, as T5's."""
        configs: list[Any] = [config for setting in self.settings for config in setting.configs]
        again = (config for config in configs if getattr(type(config).from_dict(config.to_dict()), _FLAG, False))
        return list(dict.fromkeys(type(config).__name__ for config in again))

    def apply(self) -> None:
        """Part them; nothing here can fail."""
        for owner, name, parameter in self.tensors.values():
            setattr(owner, name, parameter)
        turn_off(self.settings)


def settings_that_tie(
    model: nn.Module, places: Collection[Place], off: Sequence[Any] = (), *, whole: bool = False
) -> list[Setting]:
    """The settings of transformers by which any of these tensors is tied.

    Args:
        model: the whole model.
        places: the tensors.
        off: configurations that say no since a trained copy came, and are read as they were.
        whole: those are among the settings, whatever the places.
    """
    found = _settings(model, off)
    going = [config for s in found if any(end in places for pair in s.pairs for end in pair) for config in s.configs]
    going += off if whole else ()
    return [setting for setting in found if any(config is one for config in setting.configs for one in going)]


def why_not_off(settings: list[Setting]) -> str | None:
    """Why one of these settings cannot go off, if that is so."""
    for setting in settings:
        if _asks_for_ties(setting.model):
            return (
                f"{setting.path or 'the model'} ({type(setting.model).__name__}): its forward does otherwise where "
                f"config.{_FLAG} is False, so that its output layer cannot be parted from the embeddings"
            )
    return None


def turn_off(settings: list[Setting]) -> list[Any]:
    """Let the configurations say no; those that said otherwise."""
    configs: list[Any] = []
    for config in (config for setting in settings for config in setting.configs):
        if getattr(config, _FLAG, False):
            setattr(config, _FLAG, False)
            configs.append(config)
    return configs


def turn_on(configs: Iterable[Any]) -> None:
    """Let configurations say yes."""
    for config in configs:
        setattr(config, _FLAG, True)


def still_tied(model: nn.Module, off: Sequence[Any]) -> list[Any]:
    """Those of some configurations that said yes once, and all that they tied is one tensor, with no trained copy."""
    found = _settings(model, off)
    return [
        config
        for config in off
        if all(_is_one(pair) for s in found if any(config is one for one in s.configs) for pair in s.pairs)
    ]


def part(model: nn.Module, settings: list[Setting], apart: Collection[Place], names: Sequence[str]) -> Parted:
    """Make memory for all that settings tie, but for what a fold sets `apart`.

    Args:
        model: the whole model.
        settings: those that go off.
        apart: the tensors that get memory of their own anyway.
        names: adapters whose trained copies are the model's own tensors from now on.
    """
    paths = {module: path for path, module in model.named_modules()}
    # What others are tied to comes first, and keeps its memory.
    places = dict.fromkeys(pair[end] for end in (1, 0) for setting in settings for pair in setting.pairs)
    kept: set[int] = set()
    tensors: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    for owner, name in places:
        copies = held_by(owner)
        tensor = _after(owner, name, names)
        if (owner, name) in apart or not isinstance(tensor, nn.Parameter):
            continue
        if id(tensor) in kept and (copies is None or copies.copied.keys() <= set(names)):
            own = nn.Parameter(torch.empty_like(tensor).copy_(tensor), requires_grad=tensor.requires_grad)
            tensors[f"{paths[owner]}.{name}".lstrip(".")] = (owner, name, own)
        kept.add(id(tensor))
    return Parted(settings, tensors)


def _settings(model: nn.Module, off: Sequence[Any]) -> list[Setting]:
    turn_on(off)
    try:
        # Some classes tell by patterns and by modules what they tie, and must not find vectors among the names.
        with laid_bare(model):
            return [
                Setting(path, module, _configs(module), list(_pairs(module, tied)))
                for path, module in model.named_modules()
                if callable(expand := getattr(module, "get_expanded_tied_weights_keys", None)) and (tied := expand())
            ]
    finally:
        for config in off:
            setattr(config, _FLAG, False)


def _asks_for_ties(model: nn.Module) -> bool:
    """Whether the forward of a model reads if embeddings are tied, as Switch Transformers' does, which scales by it."""
    methods = reached_methods(original_class(model)).values()
    return any(isinstance(node, ast.Attribute) and node.attr == _FLAG for m in methods for node in ast.walk(m))


def _is_one(pair: tuple[Place, Place]) -> bool:
    (owner, name), (source, other) = pair
    return owner._parameters.get(name) is source._parameters.get(other) and not held_by(owner) and not held_by(source)


def _pairs(module: nn.Module, tied: Mapping[str, str]) -> Iterator[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
    for ends in tied.items():
        places = (name.rpartition(".") for name in ends)
        first, second = ((module.get_submodule(path), name) for path, _, name in places)
        yield first, second


def _configs(module: Any) -> tuple[Any, ...]:
    try:
        text = module.config.get_text_config()
    except ValueError:  # it has several, and says which one of them to ask
        text = module.config
    configs = (module.config,) if text is module.config else (module.config, text)
    return tuple(config for config in configs if getattr(config, _FLAG, False))


def _after(owner: nn.Module, name: str, names: Sequence[str]) -> Tensor | None:
    """The tensor that is the model's own once these adapters are folded."""
    copies = held_by(owner)
    if copies is None or name not in copies.in_place:
        return owner._parameters.get(name)
    return copies.get(owner, next((one for one in names if name in copies.copied.get(one, ())), BASE), name)
