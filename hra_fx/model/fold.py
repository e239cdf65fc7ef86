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
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.layers.target import SAVED, weight_place
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.inject import remove_adapters
from hra_fx.model.merge import (
    WITHOUT_REQUANTIZING,
    FoldedWeight,
    check_floating,
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

_REQUANTIZE = (
    " To allow this, call hra_fx.fold(model, requantize=True). To see the error first, call "
    "hra_fx.plan_fold(model, requantize=True), which changes nothing."
)


@dataclass(frozen=True)
class FoldedLayer:
    """The effect of a fold on one layer.

    Attributes:
        path: path of the layer.
        rounding: `|W'' - W'|_F / |W'|_F`, the error of casting the folded weight `W'` from float64 to the dtype of the
            weight, or of quantizing it again.
        change: `|W' - W|_F / |W|_F`, how much the adapter changes the weight.
        untied: names of the tensors that shared memory with the old weight; the new weight has its own memory.
        quantized: the quantization scheme; empty if the weight is not quantized.
    """

    path: str
    rounding: float
    change: float
    untied: tuple[str, ...] = ()
    quantized: str = ""


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

    def measure(self, path: str, layer: AdaptedLayer, weight: FoldedWeight | None = None) -> FoldedLayer:
        """Compute what the fold does to a layer."""
        scheme = quant_scheme_of(layer)
        words = scheme.description(layer) if scheme else ""
        names, untied = self.names[path], tuple(self.untied.get(path, ()))
        if not names:
            return FoldedLayer(path, 0.0, 0.0, untied, words)
        with loaded(weight_place(layer)[0]):
            weight = folded_weight(layer, names) if weight is None else weight
        return FoldedLayer(path, weight.rounding, weight.change, untied, words)

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
            measured = []
            for path, layer in layers.items():
                with loaded(weight_place(layer)[0]):
                    if done := self._write(path, layer):
                        measured.append(done)
        trained = _promote_copies(self.model, self.promoted) and bool(state.untied)
        for owner, name, parameter in also.values():
            setattr(owner, name, parameter)
        set_tied(self.ties, False)
        remove_adapters(self.model, state, self.adapters_to_remove)
        if state.configs:
            sync_layers(collect_parts(self.model), state)
        self._warn(measured, list(also), trained=trained and not all_copies(self.model))

    def _write(self, path: str, layer: AdaptedLayer) -> FoldedLayer | None:
        """Fold a layer. Returns the effect if the weight is quantized."""
        names, scheme = self.names[path], quant_scheme_of(layer)
        if not names:
            return None
        weight = folded_weight(layer, names)
        measured = self.measure(path, layer, weight) if scheme else None
        if scheme:
            if isinstance(weight.weight, nn.Parameter) and weight.weight is not layer.hra_base:
                scheme.put(layer, weight.weight)
        elif path in self.untied:
            own = torch.empty_like(layer.hra_base).copy_(weight.weight)
            set_base_weight(layer, nn.Parameter(own, requires_grad=layer.hra_base.requires_grad))
        else:
            layer.hra_base.copy_(weight.weight)
        store(*weight_place(layer))
        for name in names:
            layer.hra_u.remove(name)
        return measured

    def _warn(self, measured: list[FoldedLayer], also: list[str], *, trained: bool) -> None:
        untied = [f"{path or 'the model'} (from {', '.join(names)})" for path, names in self.untied.items()]
        setting = "config.tie_word_embeddings is now False"
        more = f" The same setting tied {', '.join(also)}, which are untied as well." if also else ""
        if again := always_tied(self.ties):
            more += f" {again[0]} turns it on again when it is loaded: set it to False right after from_pretrained."
        if untied:
            text = f"untied: {', '.join(untied)}. Each now has its own weight, so a saved model is larger"
            text += f", and {setting}." if self.ties else "."
            warnings.warn(text + more, HRAWarning, stacklevel=4)
        elif trained:
            text = f"the embeddings remain untied because one of them was trained; {setting}.{more}"
            warnings.warn(text, HRAWarning, stacklevel=4)
        if requantized := [layer for layer in measured if layer.rounding]:
            warnings.warn(_requantized(requantized), HRAWarning, stacklevel=4)
        if dropped := [name for name in self.adapters_to_remove if name not in self.promoted]:
            text = f"adapters {dropped} were not active and are removed. To keep them, pass the names to fold."
            warnings.warn(text, HRAWarning, stacklevel=4)


@dataclass(frozen=True)
class FoldPlan:
    """The effect of a fold, computed without changing the model or keeping the new weights.

    Attributes:
        layers: one `FoldedLayer` for each distinct layer.
    """

    layers: list[FoldedLayer]

    def __str__(self) -> str:
        """One line per layer: the change of the weight, the rounding error, and the tensors that it is untied from."""
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'change':>8}  rounding"]
        for layer in self.layers:
            untied = f"  untied from {', '.join(layer.untied)}" if layer.untied else ""
            again = f"  requantized ({layer.quantized})" if layer.quantized and layer.rounding else ""
            lines.append(f"{layer.path:<{width}}  {layer.change:8.4f}  {layer.rounding:.1e}{again}{untied}")
        return "\n".join(lines)


def plan_fold(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, *, requantize: bool = False
) -> FoldPlan:
    """Dry run of `fold`: compute its effect on each layer without changing the model. Same arguments and errors.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.rounding < 1e-7) for layer in plan_fold(model).layers]
        [('0', True)]
    """
    job = prepare_fold(model, adapter_names, requantize=requantize)
    return FoldPlan([job.measure(path, layer) for path, layer in adapted_layers(job.model).items()])


def prepare_fold(model: nn.Module, adapter_names: str | Sequence[str] | None, *, requantize: bool) -> FoldJob:
    """Check that adapters can be folded, without changing anything; raises the errors of `fold`."""
    root, state = root_of(model)
    names = resolve_merge_order(state, adapter_names)
    check_copies(root, collect_parts(root), names)
    layers = adapted_layers(root)
    present = {path: tuple(name for name in names if name in layer.hra_u) for path, layer in layers.items()}
    written = _check_layers(root, layers, present, requantize=requantize)
    for path, (owner, copies) in all_copies(root).items():
        for tensor in (tensor for name in names for tensor in copies.tensors(owner, name).values()):
            if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
                raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    adapters_to_remove = tuple(state.configs) if adapter_names is None else names
    untied = _untied(root, written, names, adapters_to_remove)
    ties = _ties(root, state, _tensor_refs(layers, untied), names)
    return FoldJob(root, state, present, names, adapters_to_remove, untied, ties)


def _check_layers(
    root: nn.Module, layers: Mapping[str, AdaptedLayer], names: Mapping[str, tuple[str, ...]], *, requantize: bool
) -> dict[str, AdaptedLayer]:
    """Check every layer. Returns the layers whose weights are written."""
    for path, layer in layers.items():
        if names[path] and is_on_disk(*weight_place(layer)):
            raise FoldError(
                f"{path}: accelerate loads its weight from files, which fold does not change. Save the adapter "
                "(hra_fx.save_adapter) and fold it into the checkpoint (hra_fx.fold_checkpoint)."
            )
    check_whole(root)
    if not requantize:
        check_floating(layers, {name for here in names.values() for name in here}, _REQUANTIZE)
    written: dict[str, AdaptedLayer] = {}
    for path, layer in layers.items():
        if names[path]:
            with loaded(weight_place(layer)[0]):
                if check_layer(path, layer, names[path]):
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


def _requantized(layers: list[FoldedLayer]) -> str:
    worst = max(layers, key=lambda layer: layer.rounding)
    lost = [layer for layer in layers if layer.rounding >= layer.change]
    text = (
        f"{len(layers)} weights were quantized again, with an error of up to {worst.rounding:.1e} of their norm "
        f"({worst.path}, {worst.quantized}; its adapter changed it by {worst.change:.1e})."
    )
    if lost:
        text += f" For {len(lost)} of them the error is at least as large as the change ({lost[0].path})."
    return f"{text} {WITHOUT_REQUANTIZING}"
