"""`delete_adapter`: remove an adapter. A model without adapters is a plain model again."""

from __future__ import annotations

import warnings

from torch import nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.model.activate import activate, sync_layers
from hra_fx.model.detach import remove_adapters
from hra_fx.model.offload import offloaded_copy
from hra_fx.model.state import check_no_foreign_class, collect_parts, names_in, root_of


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter. Layers without other adapters become plain layers, and a model without others a plain model.

    If it was the only active adapter, the first remaining one becomes active (as in PEFT).

    Raises:
        AdapterError: the model has no such adapter, adapters are merged, another tool replaced a class, or accelerate
            offloads trained copies.

    Warns:
        HRAWarning: another adapter becomes active.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> delete_adapter(model, "default")
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    root, state = root_of(model)
    (name,) = names_in(state, adapter_name)
    if state.merged:
        raise AdapterError(f"adapters {list(state.merged)} are merged into the weights. Call unmerge_adapter first.")
    check_no_foreign_class(root)
    if reason := offloaded_copy(root):
        raise AdapterError(reason)
    was_active = name in state.active
    remove_adapters(root, state, (name,))
    following = next(iter(state.configs)) if was_active and not state.active and state.configs else None
    if following is not None:
        activate(collect_parts(root), state, (following,), trainable=not state.configs[following].inference_mode)
        text = f"adapter {name!r} was active and is deleted; {following!r} is active now."
        warnings.warn(text, HRAWarning, stacklevel=2)
    elif state.configs:
        sync_layers(collect_parts(root), state)
