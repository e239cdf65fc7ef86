"""`fold`: the reflections go into the weights, and the model is the base model again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hra_fx.compat import tensor_version
from hra_fx.errors import AdapterError, FoldError, HRAWarning
from hra_fx.export.captured import fold_captured, is_captured
from hra_fx.export.program import fold_program, is_program
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.target import SAVED
from hra_fx.layers.trained_copies import BASE, copies_of
from hra_fx.model.activate import check_copies, refresh
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.detach import forget, release
from hra_fx.model.merge import first_of
from hra_fx.model.rotate import WAY_OUT, FoldedLayer, check_classes, check_floating, rotated, ties_of
from hra_fx.model.state import inventory, record_of, require_outermost, require_sites, root_of, sites_of
from hra_fx.model.untie import Parted, Place, Setting, part, settings_that_tie, why_not_off

if TYPE_CHECKING:
    from torch.export import ExportedProgram

M = TypeVar("M", bound="nn.Module | ExportedProgram")

_ASK = (
    " Ask for that with hra_fx.fold(model, requantize=True); hra_fx.plan_fold(model, requantize=True) shows how far, "
    "and writes nothing."
)


class FoldPlan:
    """All folded weights of a model, found finite, before the first is written.

    Attributes:
        layers: one `FoldedLayer` for each distinct layer.
    """

    def __init__(self, model: nn.Module, layers: list[FoldedLayer], names: tuple[str, ...], *, alone: bool) -> None:
        """A plan for `model` as it is now: `names` go into the weights, and stay there `alone` or beside the others."""
        self.layers = layers
        self._model = model
        self._names = names
        self._alone = alone
        self._versions = _versions(model)

    def __str__(self) -> str:
        """One line a layer: how far the weight moves, what rounding or quantising costs, and what it is untied from."""
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'change':>8}  rounding"]
        for layer in self.layers:
            apart = f"  untied from {', '.join(layer.untied)}" if layer.untied else ""
            anew = f"  quantised anew ({layer.quantized})" if layer.quantized and layer.rounding else ""
            lines.append(f"{layer.path:<{width}}  {layer.change:8.4f}  {layer.rounding:.1e}{anew}{apart}")
        return "\n".join(lines)

    def apply(self) -> nn.Module:
        """Write the weights and take the folded adapters off; returns the model.

        Raises:
            AdapterError: another tool put a class of its own over a part.
            FoldError: weights, vectors or what is active changed since the plan was made.
        """
        if _versions(self._model) != self._versions:
            raise FoldError("the model changed since the fold was planned. Plan again.")
        record = record_of(self._model)
        going = tuple(record.configs) if record and self._alone else self._names
        if record:
            require_outermost(self._model)
        own, parted = self._make()
        with uninterrupted():
            self._write(own)
            adopted = _adopt(self._model, self._names)
            parted.apply()
            if record is None:
                release(self._model)
            else:
                record.merged = ()
                forget(self._model, record, going)
                if record.configs:
                    refresh(inventory(self._model), record)
            trained = bool(adopted and record and record.untied and not copies_of(self._model))
        _tell([name for name in going if name not in self._names], self.layers, parted, trained=trained)
        return self._model

    def _make(self) -> tuple[dict[str, nn.Parameter], Parted]:
        """All that needs memory, before anything is written: path -> its own weight, and what else is parted."""
        sites = sites_of(self._model)
        places = _places(sites, self.layers)
        with torch.inference_mode(False), torch.no_grad():
            settings = _settings(self._model, places, self._names)
            parted = part(self._model, settings, places, self._names)
            # What lies outside of a part is not seen, and a weight may be tied to it.
            part_only = record_of(self._model) is None
            apart = (layer for layer in self.layers if layer.untied or layer.quantized or part_only)
            return {layer.path: _own(sites[layer.path].hra_base, layer) for layer in apart}, parted

    def _write(self, own: dict[str, nn.Parameter]) -> None:
        sites = sites_of(self._model)
        with torch.no_grad():
            for layer in self.layers:
                site = sites[layer.path]
                if packing := packing_of(site):
                    # One that nothing turned is not put back either: putting drops what its layer keeps of it.
                    if own[layer.path] is not site.hra_base:
                        packing.put(site, own[layer.path])
                elif layer.path in own:
                    setattr(site, site.hra_u.weight_name, own[layer.path])
                else:
                    site.hra_base.copy_(layer.weight)
                site.hra_u.unmerged = None


def fold(model: M, adapter_names: str | Sequence[str] | None = None, *, requantize: bool = False) -> M:
    """Fold reflections into the weights, `W <- W Q`, in place; with none left the model is a plain base model again.

    Then classes, graph, `state_dict` keys and `requires_grad` are those from before `transform`; only weights differ,
    and what `bias` and `modules_to_save` trained is in its place. All new weights are computed, in float64 where the
    device has it, and found finite before the first is written. `plan_fold` does the first half, and shows what
    rounding costs each layer.

    A weight that shares memory with other tensors (an output layer tied to the embeddings) is untied: the layer gets a
    parameter of its own, the others stay as they are, and where transformers ties them by a setting, that goes off:
    `config.tie_word_embeddings` is False then, and all else that it tied gets memory of its own too. A part alone does
    not know what it is tied to outside: fold the whole model, and its settings are seen to.

    A quantised weight (bitsandbytes, torchao) is rotated only with `requantize=True`: dequantised, and quantised anew
    in the same scheme, by which it moves once more, often farther than by the adapter.

    Args:
        model: a transformed model, or an `ExportedProgram` of `transform`, of which a new one is made.
        adapter_names: which adapters to fold, one name or several in their order; the others stay, and act on the new
            weights from now on. `None` folds the active ones, and takes the others off.

    Returns:
        `model`.

    Raises:
        AdapterError: the model has no reflections, or not these; or others come before them in the active order.
        FoldError: a weight cannot be folded: without data, not finite, quantised, with dependent Gram-Schmidt vectors,
            or tied in a model whose forward asks whether it is. The model is as it was.

    Warns:
        HRAWarning: adapters that are not active go, weights are untied, or weights were quantised anew (how far that
            moved them, and how far the adapter).

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(fold(model).state_dict())
        ['0.weight', '0.bias']
    """
    if is_program(model) or is_captured(model):
        if adapter_names is not None or requantize:
            raise AdapterError(
                "adapter_names, requantize: a captured program has one adapter, and no weight that is quantised anew. "
                "Leave them out."
            )
        captured: Any = fold_program if is_program(model) else fold_captured
        folded: M = captured(model)
        return folded
    module: Any = model
    plan_fold(module, adapter_names, requantize=requantize).apply()
    return model


def plan_fold(
    model: nn.Module, adapter_names: str | Sequence[str] | None = None, *, requantize: bool = False
) -> FoldPlan:
    """Compute what `fold` would write, and write nothing. Arguments and errors are those of `fold`.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.rounding < 1e-7) for layer in plan_fold(model).layers]
        [('0', True)]
    """
    if not isinstance(model, nn.Module) or not any(record_of(part) for part in model.modules()):
        return _plan_part(model, adapter_names, requantize=requantize)
    root, record = root_of(model)
    names = first_of(record, adapter_names)
    check_copies(root, inventory(root), names)
    sites = sites_of(root)
    check_classes(root, sites)
    if not requantize:
        check_floating(sites, names, _ASK)
    for path, (owner, copies) in copies_of(root).items():
        for tensor in (tensor for name in names for tensor in copies.tensors(owner, name).values()):
            if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
                raise FoldError(f"{path}: its trained copy is not finite. Go back to before the training diverged.")
    ties = _ties(root, sites, names, tuple(record.configs) if adapter_names is None else names)
    layers = [rotated(path, layer, names, ties.get(path, ())) for path, layer in sites.items()]
    _settings(root, _places(sites, layers), names)
    return FoldPlan(root, layers, names, alone=adapter_names is None)


def _plan_part(model: nn.Module, adapter_names: str | Sequence[str] | None, *, requantize: bool) -> FoldPlan:
    """A part of a transformed model: what acts in it is folded, and it is a plain module again."""
    sites = require_sites(model)
    present = {name for layer in sites.values() for name in layer.hra_u}
    wanted = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names or present)
    if wanted != present:
        raise AdapterError(
            f"adapter_names={sorted(wanted)}: this part of the model has {sorted(present)}. Give these, or fold the "
            "whole model."
        )
    for path, layer in sites.items():
        if layer.hra_u.unmerged is not None or set(layer.hra_u.active) != set(layer.hra_u):
            raise AdapterError(
                f"{path}: of its adapters {list(layer.hra_u)} only {list(layer.hra_u.active)} act (others are "
                "inactive, switched off or merged), and a fold of a part would lose them. Fold the whole model."
            )
    for path in copies_of(model):
        raise AdapterError(
            f"{path or 'this part'}: it has trained copies (modules_to_save or bias), and a part does not know whose. "
            "Fold the whole model."
        )
    check_classes(model, sites)
    if not requantize:
        check_floating(sites, present, _ASK)
    ties = ties_of(model, sites)
    layers = [rotated(path, layer, layer.hra_u.active, ties.get(path, ())) for path, layer in sites.items()]
    _settings(model, _places(sites, layers), ())
    return FoldPlan(model, layers, (), alone=True)


def _ties(
    root: nn.Module, sites: Mapping[str, SiteCarrier], names: tuple[str, ...], going: tuple[str, ...]
) -> dict[str, list[str]]:
    """What the weights that will be written share memory with, of all that is left after the fold."""
    written = {path: layer for path, layer in sites.items() if any(name in layer.hra_u for name in names)}
    gone: set[str] = set()
    for path, (_, copies) in copies_of(root).items():
        adopted = {tensor for name in names for tensor in copies.copied.get(name, ())}
        for tensor, whose in copies.in_place.items():
            left = {*going, BASE} if tensor in adopted else set(going)
            gone.update(f"{path}.{SAVED}.{holder}.{tensor}".lstrip(".") for holder in left)
            if whose in left.difference(names):
                gone.add(f"{path}.{tensor}".lstrip("."))
    ties = {path: [other for other in others if other not in gone] for path, others in ties_of(root, written).items()}
    return {path: others for path, others in ties.items() if others}


def _places(sites: Mapping[str, SiteCarrier], layers: Iterable[FoldedLayer]) -> set[Place]:
    return {(sites[layer.path], sites[layer.path].hra_u.weight_name) for layer in layers if layer.untied}


def _settings(root: nn.Module, places: set[Place], names: tuple[str, ...]) -> list[Setting]:
    """The settings of transformers that go off with a fold.

    Raises:
        FoldError: one of them cannot.
    """
    record = record_of(root)
    off = record.untied if record else ()
    whole = any(name in copies.copied for _, copies in copies_of(root).values() for name in names)
    settings = settings_that_tie(root, places, off, whole=whole) if places or (off and whole) else []
    if reason := why_not_off(settings):
        raise FoldError(f"{reason}. Leave it out with exclude_modules.")
    return settings


def _own(old: Tensor, layer: FoldedLayer) -> nn.Parameter:
    if isinstance(layer.weight, nn.Parameter):
        return layer.weight
    return nn.Parameter(torch.empty_like(old).copy_(layer.weight), requires_grad=old.requires_grad)


def _adopt(root: nn.Module, names: tuple[str, ...]) -> bool:
    """Make the copies of folded adapters the model's own; whether there were some."""
    adopted = False
    for owner, copies in copies_of(root).values():
        for name in names:
            adopted |= name in copies.copied
            copies.adopt(owner, name)
    return adopted


def _requantized(layers: list[FoldedLayer]) -> str:
    worst = max(layers, key=lambda layer: layer.rounding)
    lost = [layer for layer in layers if layer.rounding >= layer.change]
    text = (
        f"{len(layers)} quantised weights were quantised anew, which moves them by up to {worst.rounding:.1e} of their "
        f"norm ({worst.path}, {worst.quantized}, which the adapter turned by {worst.change:.1e})."
    )
    if lost:
        text += f" {len(lost)} of them it moves as far as the adapter did, or farther ({lost[0].path})."
    return f"{text} {WAY_OUT}"


def _tell(dropped: list[str], layers: Iterable[FoldedLayer], parted: Parted, *, trained: bool) -> None:
    apart = [f"{layer.path or 'the model'} (from {', '.join(layer.untied)})" for layer in layers if layer.untied]
    setting = "config.tie_word_embeddings is False now"
    also = f" The same setting tied {', '.join(parted.tensors)}, parted as well." if parted.tensors else ""
    if again := parted.returning:
        also += f" {again[0]} says True again when it is loaded: set it to False right after from_pretrained."
    if apart:
        text = f"untied: {', '.join(apart)}. Each has a weight of its own now, by which a saved model grows"
        text += f", and {setting}." if parted.settings else "."
        warnings.warn(text + also, HRAWarning, stacklevel=4)
    elif trained:
        warnings.warn(f"embeddings stay untied, for one was trained; {setting}.{also}", HRAWarning, stacklevel=4)
    if anew := [layer for layer in layers if layer.quantized and layer.rounding]:
        warnings.warn(_requantized(anew), HRAWarning, stacklevel=4)
    if dropped:
        text = f"adapters {dropped} were not active, and went with the fold. Name those to fold to keep the others."
        warnings.warn(text, HRAWarning, stacklevel=4)


def _versions(model: nn.Module) -> list[object]:
    """What a fold rests on: which adapters act, and identity, memory and version of every tensor that it reads.

    A tensor made in inference mode has no version.
    """
    record = record_of(model)
    state = (tuple(record.configs), record.active, record.merged, record.disabled) if record else None
    sites = sites_of(model).values()
    read = (t for layer in sites for t in (layer.hra_base, *layer.hra_u.parameters(), *layer.hra_u.buffers()))
    tensors = ((id(t), t.dtype, t.data_ptr(), tensor_version(t)) for t in read)
    return [state, *(layer.hra_u.active for layer in sites), *tensors]
