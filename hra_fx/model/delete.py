"""`delete_adapter`: an adapter off, and with the last one all that made the model an adapted one."""

from __future__ import annotations

import warnings

from torch import nn

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.model.activate import activate, refresh
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.detach import forget
from hra_fx.model.state import inventory, names_in, require_outermost, root_of


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off; layers without another one are plain again, and with the last adapter the whole model is.

    Where it was the only active one, the first that is left becomes active (as in PEFT).

    Raises:
        AdapterError: there is no such adapter, some are merged, or another tool put a class of its own over a part.

    Warns:
        HRAWarning: another adapter becomes active.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> delete_adapter(model, "default")
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    root, record = root_of(model)
    (name,) = names_in(record, adapter_name)
    if record.merged:
        raise AdapterError(f"adapters {list(record.merged)} are merged into the weights. Call unmerge_adapter first.")
    require_outermost(root)
    was_active = name in record.active
    with uninterrupted():
        forget(root, record, (name,))
        following = next(iter(record.configs)) if was_active and not record.active and record.configs else None
        if following is not None:
            activate(inventory(root), record, (following,), trainable=not record.configs[following].inference_mode)
        elif record.configs:
            refresh(inventory(root), record)
    if following is not None:
        text = f"adapter {name!r} was active and is deleted; {following!r} is active now."
        warnings.warn(text, HRAWarning, stacklevel=2)
