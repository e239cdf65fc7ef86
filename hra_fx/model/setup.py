"""Turn a plain model into an adapted one: validate the arguments, insert the layers, attach the state."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.layers.adapter_names import check_adapter_name
from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.model.activate import activate
from hra_fx.model.example_inputs import Call
from hra_fx.model.graph_module import connect_factors
from hra_fx.model.inject import AdapterFactory, all_or_nothing, inject_adapter
from hra_fx.model.root import swap_body
from hra_fx.model.state import AdapterState, attach_state, clear_state, collect_parts
from hra_fx.model.trainable import freeze, make_copies
from hra_fx.model.verify import check_against_folded


def set_up(
    model: nn.Module,
    config: HRAConfig,
    adapter_name: str,
    fill: AdapterFactory,
    copies: Mapping[tuple[str, str], Tensor] = MappingProxyType({}),
    *,
    root_class: type[SwapMixin],
    call: Call | None = None,
    layers: dict[str, nn.Module] | None = None,
) -> None:
    """Adapt a plain model with one active adapter.

    `config` was validated by `checked`. `copies` is (path of the module, name of its tensor) -> value of a trained copy
    that differs from the base model. `call` are arguments with which the model is compared with its folded weights.
    `layers` is the result of `select_checked`, if the caller has it.
    """
    with all_or_nothing() as steps:
        layers = inject_adapter(model, adapter_name, config, fill, steps, layers)
        changed = freeze(model)
        steps.callback(changed.restore, model)
        state = AdapterState({adapter_name: config}, requires_grad=changed.flags)
        make_copies(model, adapter_name, config, layers, state, steps, copies)
        steps.callback(clear_state, model)
        attach_state(model, state)
        connect_factors(model)
        if not isinstance(model, fx.GraphModule):
            swap(model, root_class)
            steps.callback(unswap, model, root_class)
            swap_body(model, steps)
        activate(collect_parts(model), state, (adapter_name,), trainable=not config.inference_mode)
        if call:
            check_against_folded(model, call)


def checked(model: Any, config: HRAConfig, adapter_name: str) -> HRAConfig:
    """Validate the arguments of `transform` and `add_adapter`, and return a validated copy of the configuration."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {model!r}.")
    config = valid_config(config)
    if not isinstance(adapter_name, str):
        raise AdapterError(f"`adapter_name` must be a string such as 'default', got {adapter_name!r}.")
    check_adapter_name(adapter_name)
    return config


def valid_config(config: HRAConfig) -> HRAConfig:
    """Return a validated copy of a configuration, which may also be a `peft.HRAConfig`."""
    theirs = getattr(sys.modules.get("peft"), "HRAConfig", None)  # if PEFT is not loaded, no object has its classes
    if theirs is not None and isinstance(config, theirs):
        return HRAConfig.from_dict(copy.deepcopy(config.to_dict()))
    if not isinstance(config, HRAConfig):
        class_name = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"`config` must be an hra_fx.HRAConfig or a peft.HRAConfig, got {class_name}. Create one with "
            "hra_fx.HRAConfig(r=..., target_modules=...), or read one with hra_fx.HRAConfig.from_pretrained(folder)."
        )
    return copy.deepcopy(dataclasses.replace(config))
