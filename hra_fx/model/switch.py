"""`set_adapter` and `disable_adapters`: which adapters act. No graph is made anew, only names change at each site."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from hra_fx.errors import HRAWarning
from hra_fx.layers.sharding import reshard
from hra_fx.model.activate import activate, check_copies, check_exchange, refresh
from hra_fx.model.merge import merged_again, unmerge_adapter
from hra_fx.model.state import inventory, names_in, only_root, root_of


def set_adapter(model: nn.Module, adapter_name: str | Iterable[str], *, inference_mode: bool = False) -> None:
    """Choose the adapters that act, and are trained; several act as `W Q_a Q_b ...`, in the order given.

    A layer that one of them does not have is left out of that one's product. Copies of `modules_to_save` and biases
    come into place with their adapter.

    Args:
        model: a transformed model.
        adapter_name: one name, or names in order; an empty list for none.
        inference_mode: leave their vectors and copies without gradients.

    Raises:
        AdapterError: there is no such adapter, or two of them save the same module; or their copies would change places
            in a model that is sharded.

    Warns:
        HRAWarning: an adapter was merged; it is unmerged first (as PEFT does).

    Example:
        >>> from hra_fx import HRAConfig, add_adapter, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]), "en")
        >>> add_adapter(model, "fr", HRAConfig(r=4, target_modules=["0"]))
        >>> set_adapter(model, ["fr", "en"])
        >>> model[0].hra_u.active
        ('fr', 'en')
    """
    parts = inventory(model)
    root, record = only_root(model, parts)
    names = names_in(record, adapter_name)
    check_copies(root, parts, names)
    check_exchange(root, parts, () if record.disabled else names)
    reshard(model)
    if record.merged:
        text = f"adapters {list(record.merged)} were merged; they are unmerged before {list(names)} are set."
        warnings.warn(text, HRAWarning, stacklevel=2)
        unmerge_adapter(root)
    activate(parts, record, names, trainable=not inference_mode)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is the base model: reflections, copies and biases of every adapter are off.

    Afterwards all is as it was before, what was merged included.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: the model has no reflections, or trained copies in a model that is sharded.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> base = nn.Linear(6, 4)
        >>> model = transform(nn.Sequential(base), HRAConfig(r=2, init_weights=False, target_modules=["0"]))
        >>> import torch
        >>> x = torch.ones(1, 6)
        >>> with disable_adapters(model):
        ...     print(bool((model(x) == nn.functional.linear(x, base.weight, base.bias)).all()))
        True
    """
    root, record = root_of(model)
    check_exchange(root, inventory(root), ())
    before = record.disabled
    with merged_again(root, record):
        try:
            record.disabled = True
            refresh(inventory(root), record)
            yield
        finally:
            record.disabled = before
            refresh(inventory(root), record)
