"""Fold adapters into the weights of a module: check everything first, then write layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hra_fx.errors import FoldError, HRAWarning
from hra_fx.layers.accelerate_hooks import is_on_disk, loaded, store
from hra_fx.layers.adapted_layer import AdaptedLayer, set_base_weight
from hra_fx.layers.target import SAVED, weight_place
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.inject import remove_adapters
from hra_fx.model.merge import (
    check_layer,
    check_whole,
    folded_weight,
    resolve_merge_order,
    ties_of,
    unmerge_adapter,
)
from hra_fx.model.state import (
    AdapterState,
    adapted_layers,
    check_no_foreign_class,
    collect_parts,
    root_of,
)
from hra_fx.model.tied import TensorRef, Tie, always_tied, find_ties, set_tied, untied_copies, why_not_untie
from hra_fx.model.trainable import check_copies, sync_layers


@dataclass(frozen=True)
class FoldJob:
    """A fold of which all layers have been checked."""

    model: nn.Module
    state: AdapterState
    #: Path of a layer -> the adapters that are folded into it, in the order of the product.
    names: Mapping[str, tuple[str, ...]]
    #: Adapters with trained copies that become the model's own tensors.
    promoted: tuple[str, ...]
    adapters_to_remove: tuple[str, ...]
    #: Path -> names of the tensors that share memory with the weight.
    untied: Mapping[str, tuple[str, ...]]
    #: The settings of transformers that are turned off.
    ties: Sequence[Tie]

    def run(self) -> None:
        """Write the weights, remove the folded adapters, and warn about everything else that changed.

        The folded adapters of a layer are removed as soon as its weight is written. So if memory runs out, the model
        still computes the same outputs, and another fold finishes the work.
        """
        check_no_foreign_class(self.model.named_modules())
        state, layers = self.state, adapted_layers(self.model)
        tensors = _tensor_refs(layers, self.untied)
        with torch.inference_mode(False), torch.no_grad():
            also = untied_copies(self.model, self.ties, tensors, self.promoted)
            if state.merged:
                unmerge_adapter(self.model)
            for path, layer in layers.items():
                if self.names[path]:
                    with loaded(weight_place(layer)[0]):
                        self._write(path, layer)
        trained = _promote_copies(self.model, self.promoted) and bool(state.untied)
        for owner, name, parameter in also.values():
            setattr(owner, name, parameter)
        set_tied(self.ties, False)
        remove_adapters(self.model, state, self.adapters_to_remove)
        if state.configs:
            sync_layers(collect_parts(self.model), state)
        self._warn(list(also), trained=trained and not all_copies(self.model))

    def _write(self, path: str, layer: AdaptedLayer) -> None:
        """Fold a layer."""
        weight = folded_weight(layer, self.names[path])
        if path in self.untied:
            own = torch.empty_like(layer.hra_base).copy_(weight)
            set_base_weight(layer, nn.Parameter(own, requires_grad=layer.hra_base.requires_grad))
        else:
            layer.hra_base.copy_(weight)
        store(*weight_place(layer))
        for name in self.names[path]:
            layer.hra_u.remove(name)

    def _warn(self, also: list[str], *, trained: bool) -> None:
        untied = [f"{path or 'the model'} (from {', '.join(names)})" for path, names in self.untied.items()]
        setting = "config.tie_word_embeddings is now False"
        more = f" The same setting tied {', '.join(also)}, which are untied as well." if also else ""
        if again := always_tied(self.ties):
            more += f" {again[0]} turns it on again when it is loaded: set it to False right after from_pretrained."
        if untied:
            text = f"untied: {', '.join(untied)}. Each now has its own weight, so a saved model is larger"
            text += f", and {setting}." if self.ties else "."
            warnings.warn(text + more, HRAWarning, stacklevel=5)
        elif trained:
            text = f"the embeddings remain untied because one of them was trained; {setting}.{more}"
            warnings.warn(text, HRAWarning, stacklevel=5)
        if dropped := [name for name in self.adapters_to_remove if name not in self.promoted]:
            text = f"adapters {dropped} were not active and are removed. To keep them, pass the names to fold."
            warnings.warn(text, HRAWarning, stacklevel=5)


def prepare_fold(model: nn.Module, adapter_names: str | Sequence[str] | None) -> FoldJob:
    """Check that adapters can be folded, without changing anything; raises the errors of `fold`."""
    root, state = root_of(model)
    names = resolve_merge_order(state, adapter_names)
    check_copies(root, collect_parts(root), names)
    layers = adapted_layers(root)
    present = {path: tuple(name for name in names if name in layer.hra_u) for path, layer in layers.items()}
    written = _check_layers(root, layers, present)
    for path, (owner, copies) in all_copies(root).items():
        for tensor in (tensor for name in names for tensor in copies.tensors(owner, name).values()):
            if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
                raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    adapters_to_remove = tuple(state.configs) if adapter_names is None else names
    untied = _untied(root, written, names, adapters_to_remove)
    ties = _ties(root, state, _tensor_refs(layers, untied), names)
    return FoldJob(root, state, present, names, adapters_to_remove, untied, ties)


def _check_layers(
    root: nn.Module, layers: Mapping[str, AdaptedLayer], names: Mapping[str, tuple[str, ...]]
) -> dict[str, AdaptedLayer]:
    """Check every layer. Returns the layers whose weights are written."""
    for path, layer in layers.items():
        if names[path] and is_on_disk(*weight_place(layer)):
            raise FoldError(
                f"{path}: accelerate loads its weight from files, which fold does not change. Save the adapter "
                "(hra_fx.save_adapter) and fold it into the checkpoint (hra_fx.fold_checkpoint)."
            )
    check_whole(root)
    written: dict[str, AdaptedLayer] = {}
    for path, layer in layers.items():
        if names[path]:
            with loaded(weight_place(layer)[0]):
                check_layer(path, layer, names[path])
                written[path] = layer
    return written


def _untied(
    root: nn.Module, written: Mapping[str, AdaptedLayer], names: tuple[str, ...], adapters_to_remove: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The tensors that remain after the fold and share memory with weights that are written."""
    # A copy that is in use has the name of the tensor that it replaces; all others, also that of the base model, are
    # below `hra_saved`. A folded copy replaces the tensor of the base model, which is then removed.
    gone: set[str] = set()
    for path, (_, copies) in all_copies(root).items():
        folded = {tensor for name in names for tensor in copies.copied.get(name, ())}
        for tensor, in_use in copies.in_place.items():
            removed = {*adapters_to_remove, BASE} if tensor in folded else set(adapters_to_remove)
            gone.update(f"{path}.{SAVED}.{holder}.{tensor}".lstrip(".") for holder in removed)
            if in_use in removed.difference(names):
                gone.add(f"{path}.{tensor}".lstrip("."))
    left = {path: tuple(o for o in others if o not in gone) for path, others in ties_of(root, written).items()}
    return {path: others for path, others in left.items() if others}


def _tensor_refs(layers: Mapping[str, AdaptedLayer], paths: Iterable[str]) -> set[TensorRef]:
    return {weight_place(layers[path]) for path in paths}


def _ties(root: nn.Module, state: AdapterState, tensors: set[TensorRef], names: tuple[str, ...]) -> list[Tie]:
    """The settings of transformers that a fold turns off, or that a folded trained copy has already turned off."""
    has_copies = any(name in copies.copied for _, copies in all_copies(root).values() for name in names)
    ties = [*find_ties(root, tensors), *(state.untied if has_copies or tensors else ())]
    if reason := why_not_untie(root, ties):
        raise FoldError(f"{reason}. Leave it out with exclude_modules.")
    return ties


def _promote_copies(root: nn.Module, names: tuple[str, ...]) -> bool:
    """Make the copies of folded adapters the model's own tensors. Returns whether there were any."""
    promoted = False
    for owner, copies in all_copies(root).values():
        for name in names:
            promoted |= name in copies.copied
            copies.promote_to_base(owner, name)
    return promoted
