"""`set_adapter`, `disable_adapters` and `set_scale`: choose the active adapters and their scales."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor, nn

from hra_fx.errors import AdapterError
from hra_fx.layers.sharding import reshard
from hra_fx.model.state import AdapterState, adapted_layers, check_unmerged, collect_parts, name_in, names_in, root_of
from hra_fx.model.trainable import activate, check_copies, check_copies_can_switch, sync_layers
from hra_fx.model.whole import check_whole

#: Held while adapters are disabled or enabled, because several threads may open blocks.
_LOCK = threading.Lock()


def set_adapter(model: nn.Module, adapter_name: str | Iterable[str], *, inference_mode: bool = False) -> None:
    """Set the active adapters and make them trainable. Several adapters compute `W Q_a Q_b ...`, in the given order.

    If a layer does not have one of the adapters, its product does not contain it. Trained copies (`modules_to_save`,
    `bias`) are switched with their adapter. Disabled adapters are enabled again, except inside a
    `with disable_adapters(model)` block.

    `DistributedDataParallel` synchronizes only the gradients of parameters that were trainable when it wrapped the
    model: wrap the model again after you set other adapters.

    Args:
        model: a transformed model.
        adapter_name: one or more names, in order; an empty list activates no adapter.
        inference_mode: whether to freeze the adapters instead of making them trainable.

    Raises:
        AdapterError: the model has no such adapter; adapters are merged; two of the adapters have trained copies of the
            same module; or the trained copies of a sharded or offloaded model would need to be switched.

    Example:
        >>> from hra_fx import HRAConfig, add_adapter, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]), "en")
        >>> add_adapter(model, "fr", HRAConfig(r=4, target_modules=["0"]))
        >>> set_adapter(model, ["fr", "en"])
        >>> model[0].hra_u.active
        ('fr', 'en')
    """
    parts = collect_parts(model)
    root, state = root_of(model, parts)
    names = names_in(state, adapter_name)
    check_unmerged(state)
    check_copies(root, names)
    check_copies_can_switch(root, parts, () if state.disabled_blocks else names)
    reshard(parts.modules)
    with _LOCK:
        if not state.disabled_blocks:
            state.disabled_calls = 0
        activate(parts, state, names, trainable=not inference_mode)


class disable_adapters:
    """Disable all adapters of a model (reflections, trained copies and biases), so that it computes the base model.

    The call disables the adapters. Without `with`, they stay disabled until you call `set_adapter` (or, for an
    `HRAModel`, `enable_adapter_layers`). As a context manager, it restores the previous state on exit. Blocks may
    overlap in several threads or asyncio tasks: the adapters are disabled while any block is open.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: the model has no adapters; adapters are merged; or the trained copies of a sharded or offloaded
            model would need to be switched.

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

    def __init__(self, model: nn.Module) -> None:
        """Disable the adapters now."""
        parts = collect_parts(model)
        self._root, self._state = root_of(model, parts)
        check_unmerged(self._state)
        check_copies_can_switch(self._root, parts, ())
        _count(self._root, self._state, calls=1)

    def __enter__(self) -> None:
        """Start a block in which `set_adapter` selects adapters but does not enable them."""
        _count(self._root, self._state, calls=-1, blocks=1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Restore the previous state, or the adapters that were set in the block."""
        _count(self._root, self._state, blocks=-1)


def _count(root: nn.Module, state: AdapterState, *, calls: int = 0, blocks: int = 0) -> None:
    with _LOCK:  # `set_adapter` and `enable_adapters` may have set them to 0
        state.disabled_calls = max(0, state.disabled_calls + calls)
        state.disabled_blocks = max(0, state.disabled_blocks + blocks)
        sync_layers(collect_parts(root), state)


def enable_adapters(model: nn.Module) -> None:
    """Enable the active adapters again after `disable_adapters`.

    Raises:
        AdapterError: the model has no adapters, or the trained copies of a sharded or offloaded model would need to be
            switched.
    """
    parts = collect_parts(model)
    root, state = root_of(model, parts)
    check_copies_can_switch(root, parts, state.active)
    with _LOCK:
        state.disabled_calls = state.disabled_blocks = 0
        sync_layers(parts, state)


def set_scale(model: nn.Module, adapter_name: str, alpha: float) -> None:
    """Set the scale of an adapter: `Q` becomes `exp(alpha log Q)`, which is orthogonal for every `alpha`.

    At 0 the adapter is the identity, and at 1 it has its full effect. In between, every rotation angle is multiplied by
    `alpha`. (PEFT ignores a scale, with a warning.) `save_adapter` saves the adapter at its scale, and `state_dict` has
    it at full scale. At a scale other than 1, its vectors do not get a gradient, and if this holds for all active
    adapters, a backward pass in train mode raises an error. Trained copies (`modules_to_save`, `bias`) are not scaled.

    Args:
        model: a transformed model.
        adapter_name: the adapter, active or not.
        alpha: the scale, from 0 to 1.

    Raises:
        AdapterError: the model has no such adapter, adapters are merged, `alpha` is out of range, vectors are not
            finite, or a layer has an odd number of reflections: its `Q` is not a rotation, so it cannot be scaled. The
            model is unchanged.

    Example:
        >>> from hra_fx import HRAConfig, report, transform
        >>> config = HRAConfig(r=2, init_weights=False, target_modules=["0"])
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), config)
        >>> whole = report(model).rows[0].angle
        >>> set_scale(model, "default", 0.5)
        >>> abs(report(model).rows[0].angle - whole / 2) < 1e-5
        True
    """
    root, state = root_of(model)
    name = name_in(state, adapter_name)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise AdapterError(f"`alpha` must be a number from 0 (base model) to 1 (full adapter), got {alpha!r}.")
    check_unmerged(state)
    check_whole(root, "scale its adapters")
    layers = {path: layer.hra_u for path, layer in adapted_layers(root).items() if name in layer.hra_u}
    chains: dict[str, Tensor] = {}
    for path, adapters in layers.items() if alpha != 1 else ():
        try:
            chains[path] = adapters.scaled(name, float(alpha))
        except AdapterError as error:
            raise AdapterError(f"{path}: adapter {name!r}: {error}") from error
    for path, adapters in layers.items():
        adapters.scale(name, float(alpha), chains.get(path))
    sync_layers(collect_parts(root), state)
