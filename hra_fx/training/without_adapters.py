"""Run a model without its adapters, whether they are of hra_fx or of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.peft_layers import is_of_peft, is_peft_layer
from hra_fx.model.state import collect_parts, root_of
from hra_fx.model.switch import disable_adapters


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model is its base model, in eval mode and without gradients.

    Afterwards, the mode of each module and the `requires_grad` of each parameter are as before.

    Raises:
        AdapterError: adapters of PEFT are merged; or see `disable_adapters`.
    """
    modes = [(vars(part), part.training) for part in model.modules()]
    adapters_off = disable_adapters if collect_parts(model).roots else _peft_adapters_off
    with adapters_off(model), torch.no_grad():
        try:
            for own, _ in modes:
                own["training"] = False
            yield
        finally:
            for own, mode in modes:
                own["training"] = mode


@contextmanager
def _peft_adapters_off(model: nn.Module) -> Iterator[None]:
    """Context manager in which adapters of PEFT are off, if there are any. PEFT then trains all active ones."""
    if any(layer.merged for layer in _peft_layers(model)):  # PEFT would unmerge them for good
        raise AdapterError("adapters are merged into the weights. Call unmerge_adapter first.")
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = _peft_model(model)
    injected: list[Any] = [
        part for part in model.modules() if is_of_peft(part) and hasattr(type(part), "enable_adapters")
    ]
    switched = [part for part in injected if peft_model is None and not part.disable_adapters]
    try:
        with nullcontext() if peft_model is None else peft_model.disable_adapter():
            for part in switched:
                part.enable_adapters(False)
            yield
    finally:
        for part in switched:
            part.enable_adapters(True)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


def check_adapters_act(model: nn.Module) -> None:
    """Check that a model has adapters of hra_fx or PEFT that are active and enabled."""
    parts, layers = collect_parts(model), _peft_layers(model)
    if not parts.roots and (layers or _peft_model(model) is not None):
        acting = not layers or any(layer.active_adapters and not layer.disable_adapters for layer in layers)
    else:
        _, state = root_of(model, parts)
        acting = bool(state.active) and not state.disabled
    if not acting:
        raise AdapterError("the adapters are disabled, so the model is its base. Enable them first, with set_adapter.")


def _peft_layers(model: nn.Module) -> list[Any]:
    """The layers of PEFT; those of methods that add tokens or caches to a call have none."""
    return [part for part in model.modules() if is_peft_layer(part)]


def _peft_model(model: nn.Module) -> Any:
    """The `PeftModel` in a model, or `None`."""
    return next((part for part in model.modules() if is_of_peft(part) and hasattr(part, "disable_adapter")), None)
