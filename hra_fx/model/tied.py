"""Trained copies of tied weights, when they become the model's own tensors.

If `config.tie_word_embeddings` is set, transformers ties weights when it loads a model and whenever `tie_weights` is
called. So when one of two tied weights gets its own values, the setting must be turned off.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

from hra_fx.compat import state_modules
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.target import SAVED
from hra_fx.layers.trained_copies import BASE, Copies, get_copies

#: The setting of a configuration that makes transformers tie weights.
TIE_SETTING = "tie_word_embeddings"


def settings_to_turn_off(model: nn.Module, folded: Collection[str]) -> list[Any]:
    """The configurations that would tie weights again which differ when the copies of some adapters are folded."""
    found = [getattr(part, "config", None) for part in model.modules()] if parts(model, folded) else []
    return list({id(config): config for config in found if getattr(config, TIE_SETTING, False)}.values())


def parts(model: nn.Module, adapters: Collection[str]) -> bool:
    """Whether some names of one tensor of the base model have different tensors with the copies of these adapters."""
    then: dict[int, set[int]] = {}  # id of a tensor of the base model -> ids of the tensors that replace it
    for path, module in state_modules(model):
        copies = get_copies(module) or Copies()
        for name, tensor in module._parameters.items() if SAVED not in path.split(".") else ():
            if tensor is not None:
                adapter = next((own for own in adapters if name in copies.copied.get(own, ())), BASE)
                new = copies.get(module, adapter, name)
                then.setdefault(id(copies.get(module, BASE, name)), set()).add(id(new))
    return any(len(tensors) > 1 for tensors in then.values())


def separate(model: nn.Module) -> None:
    """Give every name of a shared parameter its own memory, because a setting that tied some of them is turned off."""
    seen = set()
    for path, module in state_modules(model):
        for name, tensor in module._parameters.items() if SAVED not in path.split(".") else ():
            if tensor is not None and id(tensor) in seen:
                module._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            seen.add(id(tensor))


def reads_tie_setting(model: nn.Module) -> bool:
    """Whether a forward in the model reads the setting: Switch Transformers scales its output depending on it."""
    codes = [getattr(inspect.unwrap(original_class(part).forward), "__code__", None) for part in model.modules()]
    return any(code is not None and TIE_SETTING in code.co_names for code in codes)
