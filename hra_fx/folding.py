"""`fold`: the reflections go into the weights, and the model is the base model again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from hra_fx.adapted import Record, inventory, record_of, require_sites, root_of, sites_of
from hra_fx.adapters.acting import check_copies, refresh
from hra_fx.adapters.copies import copies_of
from hra_fx.adapters.merging import first_of
from hra_fx.adapters.releasing import forget, release
from hra_fx.errors import AdapterError, FoldError, HRAWarning
from hra_fx.rotating import FoldedLayer, check_weights, rotated

M = TypeVar("M", bound=nn.Module)


class FoldPlan:
    """All folded weights of a model, found finite, before the first is written.

    Attributes:
        layers: one `FoldedLayer` for each distinct layer.
    """

    def __init__(self, model: nn.Module, layers: list[FoldedLayer], names: tuple[str, ...] | None) -> None:
        """A plan for `model` as it is now; `names` of the adapters that go, or `None` for all."""
        self.layers = layers
        self._model = model
        self._names = names
        self._versions = _versions(model)

    def __str__(self) -> str:
        """One line a layer: how far the weight moves, and what rounding to its dtype costs."""
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = (f"{layer.path:<{width}}  {layer.change:8.4f}  {layer.rounding:.1e}" for layer in self.layers)
        return "\n".join([f"{'layer':<{width}}  {'change':>8}  rounding", *lines])

    def apply(self) -> nn.Module:
        """Write the weights and take the folded adapters off; returns the model.

        Raises:
            FoldError: weights or vectors changed since the plan was made.
        """
        if _versions(self._model) != self._versions:
            raise FoldError("the model changed since the fold was planned. Plan again.")
        sites = sites_of(self._model)
        with torch.no_grad():
            for layer in self.layers:
                sites[layer.path].weight.copy_(layer.weight)
                sites[layer.path].hra_u.unmerged = None
        record = record_of(self._model)
        if record is None:
            release(self._model)
        else:
            _settle(self._model, record, self._names)
        return self._model


def fold(model: M, adapter_names: str | Sequence[str] | None = None) -> M:
    """Fold reflections into the weights, `W <- W Q`, in place; with none left the model is a plain base model again.

    Then classes, graph, `state_dict` keys and `requires_grad` are those from before `transform`; only weights differ,
    and what `bias` and `modules_to_save` trained is in its place. All new weights are computed, in float64 where the
    device has it, and found finite before the first is written. `plan_fold` does the first half, and shows what
    rounding costs each layer.

    Args:
        model: a transformed model.
        adapter_names: which adapters to fold, one name or several in their order; the others stay, and act on the new
            weights from now on. `None` folds the active ones, and takes the others off.

    Returns:
        `model`.

    Raises:
        AdapterError: the model has no reflections, or not these; or others come before them in the active order.
        FoldError: a weight cannot be folded: tied to another tensor, without data, not finite, or with dependent
            Gram-Schmidt vectors. The model is as it was.

    Warns:
        HRAWarning: adapters that are not active go, or the fold leaves embeddings untied.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(fold(model).state_dict())
        ['0.weight', '0.bias']
    """
    plan_fold(model, adapter_names).apply()
    return model


def plan_fold(model: nn.Module, adapter_names: str | Sequence[str] | None = None) -> FoldPlan:
    """Compute what `fold` would write, and write nothing. Arguments and errors are those of `fold`.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.rounding < 1e-7) for layer in plan_fold(model).layers]
        [('0', True)]
    """
    if not isinstance(model, nn.Module) or not any(record_of(part) for part in model.modules()):
        return _plan_part(model, adapter_names)
    root, record = root_of(model)
    names = first_of(record, adapter_names)
    check_copies(root, inventory(root), names)
    sites = sites_of(root)
    check_weights(root, sites)
    return FoldPlan(
        root,
        [rotated(path, layer, names) for path, layer in sites.items()],
        None if adapter_names is None else names,
    )


def _plan_part(model: nn.Module, adapter_names: str | Sequence[str] | None) -> FoldPlan:
    """A part of a transformed model: what acts in it is folded, and it is a plain module again."""
    sites = require_sites(model)
    present = {name for layer in sites.values() for name in layer.hra_u}
    wanted = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names or present)
    if wanted != present:
        raise AdapterError(
            f"adapter_names={sorted(wanted)}: this part of the model has {sorted(present)}. Give these, or fold the "
            "whole model."
        )
    check_weights(model, sites)
    return FoldPlan(model, [rotated(path, layer, layer.hra_u.active) for path, layer in sites.items()], None)


def _settle(root: nn.Module, record: Record, names: tuple[str, ...] | None) -> None:
    """Make the copies of folded adapters the model's own, and forget those adapters."""
    record.merged = ()
    folded = record.active if names is None else names
    for owner, copies in copies_of(root).values():
        for name in folded:
            if record.untied and name in copies.copied:
                text = "embeddings stay untied, for one was trained; config.tie_word_embeddings is False now."
                warnings.warn(text, HRAWarning, stacklevel=4)
                record.untied = False
            copies.adopt(owner, name)
    if names is None and (dropped := [name for name in record.configs if name not in folded]):
        text = f"adapters {dropped} were not active, and go with the fold. Save them before, or name those to fold."
        warnings.warn(text, HRAWarning, stacklevel=4)
    forget(root, record, tuple(record.configs) if names is None else names)
    if record.configs:
        refresh(inventory(root), record)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Identity and version of every tensor that a fold reads; a tensor made in inference mode has no version."""
    sites = sites_of(model).values()
    read = (t for layer in sites for t in (layer.weight, *layer.hra_u.parameters(), *layer.hra_u.buffers()))
    return [(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in read]
