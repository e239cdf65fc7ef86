"""Trained copies of tied weights, when they become the model's own tensors.

If `config.tie_word_embeddings` is set, transformers ties weights when it loads a model and whenever `tie_weights` is
called. So when one of two tied weights gets its own values, the setting must be turned off.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from hra_fx.compat import state_modules
from hra_fx.errors import FoldError
from hra_fx.layers.target import SAVED
from hra_fx.layers.trained_copies import BASE, Copies, get_copies

#: The setting of a configuration that makes transformers tie weights.
TIE_SETTING = "tie_word_embeddings"


def parts(model: nn.Module, adapters: Collection[str]) -> bool:
    """Whether some names of one tensor of the base model have different tensors with the copies of these adapters."""
    return any(len(set(tensors)) > 1 for tensors in _places(model, adapters))


def settings_to_turn_off(model: nn.Module, folded: Collection[str]) -> list[Any]:
    """The configurations that would tie weights again which differ when the copies of some adapters are folded.

    Raises a `FoldError` if other weights would stay tied, because the setting is for all of them.
    """
    if not parts(model, folded):
        return []
    found = [getattr(part, "config", None) for part in model.modules()]
    settings = list({id(config): config for config in found if getattr(config, TIE_SETTING, False)}.values())
    if settings and any(len(set(tensors)) < len(tensors) for tensors in _places(model, folded)):
        raise FoldError(
            f"{type(model).__name__}: a trained copy of one of several tied weights cannot be folded, because "
            f"config.{TIE_SETTING} applies to all of them. Save the adapter (hra_fx.save_adapter) and load it over the "
            "base model."
        )
    return settings


def _places(model: nn.Module, adapters: Collection[str]) -> Collection[list[int]]:
    """For each tensor of the base model: the ids of the tensors that its names have with the copies of adapters."""
    places: dict[int, list[int]] = {}
    for path, module in state_modules(model):
        copies = get_copies(module) or Copies()
        for name, tensor in module._parameters.items() if SAVED not in path.split(".") else ():
            if tensor is not None:
                adapter = next((own for own in adapters if name in copies.copied.get(own, ())), BASE)
                own = copies.get(module, adapter, name)
                places.setdefault(id(copies.get(module, BASE, name)), []).append(id(own))
    return places.values()
