"""Run a model without its adapters, whether they are of hra_fx or of PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hra_fx.compat import without_peft_adapters
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
    parts = list(model.modules())
    if any(is_peft_layer(part) and part.merged for part in parts):  # PEFT would unmerge them for good
        raise AdapterError("adapters are merged into the weights. Call unmerge_adapter first.")
    modes = [(part, part.training) for part in parts]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.callback(_restore, modes, trained)
        for part in parts:
            part.training = False
        stack.enter_context(torch.no_grad())
        peft_model: Any = find_peft_model(model)
        if collect_parts(model).roots:
            stack.enter_context(disable_adapters(model))
        elif peft_model is not None:
            stack.enter_context(peft_model.disable_adapter())
        else:  # layers that PEFT has injected
            stack.enter_context(without_peft_adapters(parts))
        yield


def find_peft_model(model: nn.Module) -> nn.Module | None:
    """The `PeftModel` in a model."""
    return next((part for part in model.modules() if is_of_peft(part) and hasattr(part, "disable_adapter")), None)


def check_adapters_act(model: nn.Module) -> None:
    """Check that a model has adapters of hra_fx or PEFT that are active, enabled and not merged."""
    layers: list[Any] = [part for part in model.modules() if is_peft_layer(part)]
    if collect_parts(model).roots or (not layers and find_peft_model(model) is None):
        _, state = root_of(model)
        merged, acting = bool(state.merged), bool(state.active) and not state.disabled
    else:
        merged = any(layer.merged for layer in layers)
        acting = not layers or any(layer.active_adapters and not layer.disable_adapters for layer in layers)
    if merged:
        raise AdapterError("adapters are merged into the weights. Call unmerge_adapter first.")
    if not acting:
        raise AdapterError("the adapters are disabled, so the model is its base. Enable them first, with set_adapter.")


def _restore(modes: list[tuple[nn.Module, bool]], trained: list[tuple[nn.Parameter, bool]]) -> None:
    for part, mode in modes:
        part.training = mode
    for parameter, is_trained in trained:
        if parameter.requires_grad != is_trained:
            parameter.requires_grad_(is_trained)
