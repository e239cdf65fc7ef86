"""`add_adapter`: add another adapter to a transformed model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.sharding import is_trained_by_zero
from hra_fx.model.activate import sync_layers
from hra_fx.model.inject import AdapterFactory, all_or_nothing, inject_adapter, random_init
from hra_fx.model.setup import checked
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, root_of
from hra_fx.model.trainable import make_copies, set_requires_grad
from hra_fx.selection.select import with_head


def add_adapter(model: nn.Module, adapter_name: str, config: HRAConfig, *, low_cpu_mem_usage: bool = False) -> None:
    """Add another adapter to a transformed model, with its own configuration. The new adapter is not active.

    Args:
        model: a transformed model.
        adapter_name: name of the new adapter.
        config: the configuration, as for `transform`.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Raises:
        AdapterError: the name is taken, adapters are merged, or DeepSpeed's ZeRO already trains the model.
        ConfigError, SelectionError, UnsupportedLayerError: see `transform`. After any error the model is unchanged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), HRAConfig(r=2, target_modules=["0"]))
        >>> add_adapter(model, "other", HRAConfig(r=3, target_modules=["0", "1"]))
        >>> [name for name, _ in model.named_parameters() if "hra_u" in name]
        ['0.hra_u.default', '0.hra_u.other', '1.hra_u.other']
    """
    root, state = root_of(model)
    config = with_head(root, checked(root, config, adapter_name))
    add_filled_adapter(root, state, adapter_name, config, random_init(adapter_name, config, on_meta=low_cpu_mem_usage))


def add_filled_adapter(
    root: nn.Module,
    state: AdapterState,
    adapter_name: str,
    config: HRAConfig,
    fill: AdapterFactory,
    copies: Mapping[tuple[str, str], Tensor] = MappingProxyType({}),
    layers: dict[str, nn.Module] | None = None,
) -> None:
    """Add an adapter with the vectors from `fill` and with these trained copies; raises the errors of `add_adapter`.

    `layers` is the result of `select_checked`, if the caller has it.
    """
    if adapter_name in state.configs:
        raise AdapterError(
            f"adapter {adapter_name!r} already exists in this model. Delete it first, or choose another name."
        )
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are merged into the weights. Call unmerge_adapter first.")
    for path, layer in adapted_layers(root).items():
        if any(map(is_trained_by_zero, layer.hra_u.parameters())):
            raise AdapterError(
                f"{path}: DeepSpeed already trains it, and would not manage the vectors of adapter {adapter_name!r}. "
                "Add it before deepspeed.initialize, which Trainer.train calls, or to a new model."
            )
    with all_or_nothing() as undo:
        layers = inject_adapter(root, adapter_name, config, fill, undo, layers)
        make_copies(root, adapter_name, config, layers, state, undo, copies)
        state.configs[adapter_name] = config
        undo.callback(state.configs.pop, adapter_name, None)
        parts = collect_parts(root)
        set_requires_grad(parts, (adapter_name,), False)
        sync_layers(parts, state)
