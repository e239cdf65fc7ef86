"""Turn a plain model into an adapted one, and add more adapters: `add_adapter`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, fx, nn

from hra_fx.compat import loaded_class
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.model.graphs import rewrite
from hra_fx.model.inject import AdapterFactory, inject_adapter, random_init
from hra_fx.model.remove import removed_on_error
from hra_fx.model.root import AdaptedModel, swap_root
from hra_fx.model.state import (
    AdapterState,
    attach_state,
    check_unmerged,
    collect_parts,
    get_state,
    is_adapted,
    root_of,
)
from hra_fx.model.trainable import activate, checked_copies, freeze, make_copies, set_requires_grad, sync_layers
from hra_fx.model.whole import check_whole
from hra_fx.selection.check import select_checked
from hra_fx.selection.select import walk, with_head


def put_adapter(
    model: nn.Module,
    name: str,
    config: HRAConfig,
    fill: AdapterFactory,
    copies: Mapping[tuple[str, str], Tensor] = MappingProxyType({}),
    *,
    root_class: type[AdaptedModel] | None = None,
    layers: dict[str, nn.Module] | None = None,
) -> None:
    """Add an adapter with the vectors from `fill`. After an error, the model is unchanged.

    Args:
        model: a transformed model; or a plain model, in which the new adapter is active.
        name: name of the adapter.
        config: a configuration from `valid_config`.
        fill: adds the vectors to a layer.
        copies: (path of a module, name of its tensor) -> value of a trained copy that differs from the base model.
        root_class: what is mixed into the class of a plain model.
        layers: the result of `select_checked`, if the caller has it.
    """
    known = get_state(model)
    if known is not None:
        if name in known.configs:
            raise AdapterError(f"adapter {name!r} already exists in this model. Delete it, or choose another name.")
        check_unmerged(known)
        check_whole(model, f"add adapter {name!r}", "adding")
    state = known or AdapterState(frozen=freeze(model))
    with removed_on_error(model, state, name, config):
        modules = dict(model.named_modules(remove_duplicate=False))
        layers = select_checked(model, config, walk(model, modules.items())) if layers is None else layers
        wanted = checked_copies(model, config, layers)
        is_new = not all(map(is_adapted, layers.values()))
        inject_adapter(modules, layers, fill)
        make_copies(model, name, wanted, copies)
        if is_new and isinstance(model, fx.GraphModule):
            rewrite(model)
        if known is None:
            attach_state(model, state)
            if root_class is not None and not isinstance(model, fx.GraphModule):
                swap_root(model, root_class)
            activate(collect_parts(model), state, (name,), trainable=not config.inference_mode)
        else:
            parts = collect_parts(model)
            set_requires_grad(parts, {name: False})
            sync_layers(parts, state)


def valid_config(config: HRAConfig) -> HRAConfig:
    """Return a validated copy of a configuration, which may also be a `peft.HRAConfig`."""
    if isinstance(config, loaded_class("peft", "HRAConfig")):
        return HRAConfig.from_dict(copy.deepcopy(config.to_dict()))
    if not isinstance(config, HRAConfig):
        class_name = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(f"`config` must be an hra_fx.HRAConfig or a peft.HRAConfig, got {class_name}.")
    return copy.deepcopy(dataclasses.replace(config))


def add_adapter(model: nn.Module, adapter_name: str, config: HRAConfig, *, low_cpu_mem_usage: bool = False) -> None:
    """Add another adapter to a transformed model, with its own configuration. The new adapter is not active.

    Args:
        model: a transformed model.
        adapter_name: name of the new adapter.
        config: the configuration, as for `transform`.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Raises:
        AdapterError: the name is taken, adapters are merged, the model is sharded, or DeepSpeed's ZeRO already trains
            it.
        ConfigError, SelectionError, UnsupportedLayerError: see `transform`. After any error the model is unchanged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), HRAConfig(r=2, target_modules=["0"]))
        >>> add_adapter(model, "other", HRAConfig(r=3, target_modules=["0", "1"]))
        >>> [name for name, _ in model.named_parameters() if "hra_u" in name]
        ['0.hra_u.default', '0.hra_u.other', '1.hra_u.other']
    """
    root, _ = root_of(model)
    config = with_head(root, valid_config(config))
    put_adapter(root, adapter_name, config, random_init(adapter_name, config, on_meta=low_cpu_mem_usage))
