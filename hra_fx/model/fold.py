"""Fold adapters into the weights of a module: check everything first, then write layer by layer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hra_fx.errors import FoldError, HRAWarning
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.merge import check_layers, first_in_product, folded_weight, unmerge_adapter
from hra_fx.model.remove import remove_adapters
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, root_of
from hra_fx.model.tied import TIE_SETTING, settings_to_turn_off
from hra_fx.model.trainable import sync_layers


def prepare_fold(model: nn.Module, adapter_names: str | Sequence[str] | None) -> Callable[[], None]:
    """Check that adapters can be folded, and return the function that folds them; raises the errors of `fold`."""
    root, state = root_of(model)
    names = first_in_product(state, adapter_names)
    present = check_layers(root, adapted_layers(root), names)
    for (path, _), tensor in (item for name in names for item in copies_of(root, name).items()):
        if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    settings = settings_to_turn_off(root, names)
    dropped = tuple(name for name in state.configs if name not in names) if adapter_names is None else ()
    return functools.partial(_fold, root, state, present, names, dropped, settings)


def _fold(
    root: nn.Module,
    state: AdapterState,
    present: Mapping[str, tuple[str, ...]],
    names: tuple[str, ...],
    dropped: tuple[str, ...],
    settings: Sequence[Any],
) -> None:
    """Fold `present`, the adapters of each layer, and remove the adapters `dropped`.

    The folded adapters of a layer are removed as soon as its weight is written. So if memory runs out, the model still
    computes the same outputs, and another fold finishes the work.
    """
    layers = adapted_layers(root)
    with torch.inference_mode(False), torch.no_grad():
        if state.merged:
            unmerge_adapter(root)
        for path, here in present.items():
            layers[path].hra_base.copy_(folded_weight(layers[path], here))
            for name in here:
                layers[path].hra_u.remove(name)
    for owner, copies in all_copies(root).values():
        for name in names:
            copies.promote_to_base(owner, name)
    for config in settings:
        setattr(config, TIE_SETTING, False)
    if settings:
        text = f"a trained copy of a tied weight was folded, so config.{TIE_SETTING} is now False."
        warnings.warn(text, HRAWarning, stacklevel=4)
    remove_adapters(root, state, (*names, *dropped))
    if state.configs:
        sync_layers(collect_parts(root), state)
    if dropped:
        text = f"adapters {list(dropped)} were not active and are removed. To keep them, pass the names to fold."
        warnings.warn(text, HRAWarning, stacklevel=4)
