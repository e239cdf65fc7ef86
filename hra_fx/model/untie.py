"""Weights that transformers ties by `config.tie_word_embeddings`: find them, and untie them when one of them changes.

transformers ties them when it loads a model and whenever `tie_weights` is called, and saves only one of them. One
setting may tie several pairs (T5 and BART: the embeddings of encoder and decoder; BERT: the bias of the head). So when
one weight gets its own values, the setting is turned off, and everything else that it tied gets its own memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.trained_copies import BASE, get_copies
from hra_fx.model.base_view import base_model_view

#: (module, name of its tensor).
Place: TypeAlias = tuple[nn.Module, str]
#: The setting of a configuration by which transformers ties weights.
TIE_SETTING = "tie_word_embeddings"


class Tie(NamedTuple):
    """What one transformers model ties by its configuration.

    Attributes:
        path: of the transformers model within the whole model.
        configs: the configurations whose setting is on: its own and that of its text model, which transformers reads
            when it loads a file.
        pairs: (name of the tied tensor, name of the tensor that it is tied to), within the whole model.
    """

    path: str
    configs: tuple[Any, ...]
    pairs: tuple[tuple[str, str], ...]


def find_ties(model: nn.Module, places: Collection[Place]) -> list[Tie]:
    """What transformers ties by the settings that tie one of these tensors, as far as the settings are on."""
    found = _all_ties(model) if places else []
    touched = [tie for tie in found if any(place_of(model, name) in places for pair in tie.pairs for name in pair)]
    # BART and its inner model share one configuration, and both tie weights by it.
    adapters_to_remove = [config for tie in touched for config in tie.configs]
    return [tie for tie in found if any(config is one for config in tie.configs for one in adapters_to_remove)]


def _all_ties(model: nn.Module) -> list[Tie]:
    found = []
    # Some classes find what they tie by patterns over the parameter names, which must be those of the base model.
    with base_model_view(model):
        for path, module in model.named_modules():
            expand = getattr(module, "get_expanded_tied_weights_keys", None)
            if callable(expand) and (keys := expand()):
                pairs = ((f"{path}.{a}".lstrip("."), f"{path}.{b}".lstrip(".")) for a, b in keys.items())
                found.append(Tie(path, _configs(module), tuple(pairs)))
    return found


def place_of(model: nn.Module, name: str) -> Place:
    """The module that holds a tensor, and the name of the tensor there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def why_not_untie(model: nn.Module, ties: Iterable[Tie]) -> str | None:
    """Why one of these settings cannot be turned off, if so."""
    for tie in ties:
        part = model.get_submodule(tie.path)
        if reads_tie_setting(part):
            return (
                f"{tie.path or 'the model'} ({type(part).__name__}): its forward depends on config.{TIE_SETTING}, so "
                "its output layer cannot be untied from the embeddings"
            )
    return None


def reads_tie_setting(model: nn.Module) -> bool:
    """Whether a forward in the model reads the setting: Switch Transformers and UDOP scale their outputs by it."""
    kinds = {kind for module in model.modules() for kind in original_class(module).__mro__}
    forwards = (inspect.unwrap(vars(kind)["forward"]) for kind in kinds if "forward" in vars(kind))
    return any(TIE_SETTING in function.__code__.co_names for function in forwards if isinstance(function, FunctionType))


def set_tied(ties: Iterable[Tie], wanted: bool) -> None:
    """Turn the settings on or off."""
    for tie in ties:
        for config in tie.configs:
            setattr(config, TIE_SETTING, wanted)


def always_tied(ties: Iterable[Tie]) -> list[str]:
    """Configuration classes that turn the setting on again when they are loaded, as T5's."""
    configs = [config for tie in ties for config in tie.configs]
    return list(dict.fromkeys(type(config).__name__ for config in configs if ties_when_loaded(config)))


def ties_when_loaded(config: Any) -> bool:
    """Whether a configuration turns the setting on again when it is loaded."""
    return bool(getattr(type(config).from_dict({**config.to_dict(), TIE_SETTING: False}), TIE_SETTING, False))


def is_tied(model: nn.Module, tie: Tie) -> bool:
    """Whether everything that the setting ties is one tensor, and none of it has trained copies."""
    for pair in tie.pairs:
        (owner, name), (source, other) = (place_of(model, end) for end in pair)
        if owner._parameters.get(name) is not source._parameters.get(other) or get_copies(owner) or get_copies(source):
            return False
    return True


def untied_copies(
    model: nn.Module, ties: Iterable[Tie], written: Collection[Place], folded: Collection[str]
) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Memory for all that some settings tie, except for the tensors that get their own anyway.

    Args:
        model: the whole model.
        ties: the settings that are turned off.
        written: the tensors that get their own memory anyway.
        folded: adapters whose trained copies become the model's own tensors.

    Returns:
        name -> (module, name of its tensor, its own parameter).
    """
    # The sources come first, and keep their memory.
    names = dict.fromkeys(pair[end] for end in (1, 0) for tie in ties for pair in tie.pairs)
    kept: set[int] = set()
    copies: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    for full in names:
        owner, name = place_of(model, full)
        held = get_copies(owner)
        tensor: Tensor | None = owner._parameters.get(name)
        if held is not None and name in held.in_place:
            tensor = held.get(owner, next((a for a in folded if name in held.copied.get(a, ())), BASE), name)
        if (owner, name) in written or not isinstance(tensor, nn.Parameter):
            continue
        if id(tensor) in kept and (held is None or held.copied.keys() <= set(folded)):
            own = nn.Parameter(torch.empty_like(tensor).copy_(tensor), requires_grad=tensor.requires_grad)
            copies[full] = (owner, name, own)
        kept.add(id(tensor))
    return copies


def _configs(module: Any) -> tuple[Any, ...]:
    try:
        text = module.config.get_text_config()
    except ValueError:  # it has several text models
        text = module.config
    configs = (module.config,) if text is module.config else (module.config, text)
    return tuple(config for config in configs if getattr(config, TIE_SETTING, False))
