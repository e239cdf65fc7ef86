"""Fold adapters into the weights of a module: check everything first, then write layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hra_fx.errors import FoldError, HRAWarning
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.inject import remove_adapters
from hra_fx.model.merge import check_layers, first_in_product, folded_weight, unmerge_adapter
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, root_of
from hra_fx.model.tied import TIE_SETTING, reads_tie_setting, separate, settings_to_turn_off
from hra_fx.model.trainable import sync_layers


@dataclass(frozen=True)
class FoldJob:
    """A fold of which all layers have been checked."""

    model: nn.Module
    state: AdapterState
    #: Path of a layer whose weight is written -> the adapters that are folded into it, in the order of the product.
    names: Mapping[str, tuple[str, ...]]
    #: Adapters with trained copies that become the model's own tensors.
    promoted: tuple[str, ...]
    adapters_to_remove: tuple[str, ...]
    #: The configurations of transformers whose `tie_word_embeddings` is turned off.
    settings: Sequence[Any]

    def run(self) -> None:
        """Write the weights, remove the folded adapters, and warn about everything else that changed.

        The folded adapters of a layer are removed as soon as its weight is written. So if memory runs out, the model
        still computes the same outputs, and another fold finishes the work.
        """
        state, layers = self.state, adapted_layers(self.model)
        with torch.inference_mode(False), torch.no_grad():
            if state.merged:
                unmerge_adapter(self.model)
            for path, names in self.names.items():
                layers[path].hra_base.copy_(folded_weight(layers[path], names))
                for name in names:
                    layers[path].hra_u.remove(name)
        for owner, copies in all_copies(self.model).values():
            for name in self.promoted:
                copies.promote_to_base(owner, name)
        if self.settings:
            separate(self.model)
        for config in self.settings:
            setattr(config, TIE_SETTING, False)
        remove_adapters(self.model, state, self.adapters_to_remove)
        if state.configs:
            sync_layers(collect_parts(self.model), state)
        self._warn()

    def _warn(self) -> None:
        if self.settings:
            text = f"a trained copy of a tied weight was folded, so config.{TIE_SETTING} is now False."
            warnings.warn(text, HRAWarning, stacklevel=5)
        if dropped := [name for name in self.adapters_to_remove if name not in self.promoted]:
            text = f"adapters {dropped} were not active and are removed. To keep them, pass the names to fold."
            warnings.warn(text, HRAWarning, stacklevel=5)


def prepare_fold(model: nn.Module, adapter_names: str | Sequence[str] | None) -> FoldJob:
    """Check that adapters can be folded, without changing anything; raises the errors of `fold`."""
    root, state = root_of(model)
    names = first_in_product(state, adapter_names)
    present = check_layers(root, adapted_layers(root), names)
    for (path, _), tensor in (item for name in names for item in copies_of(root, name).items()):
        if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    adapters_to_remove = tuple(state.configs) if adapter_names is None else names
    settings = settings_to_turn_off(root, names)
    if settings and reads_tie_setting(root):
        raise FoldError(
            f"{type(root).__name__}: its forward depends on config.{TIE_SETTING}, so a trained copy of a tied weight "
            "cannot be folded. Save the adapter (hra_fx.save_adapter) and load it over the base model."
        )
    return FoldJob(root, state, present, names, adapters_to_remove, settings)
