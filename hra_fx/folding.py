"""`fold`: the reflections go into the weights, and the model is the base model again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from hra_fx import householder
from hra_fx.adapted import drop_record, record_of, regions_of, require_sites, sites_of
from hra_fx.carrier.layer import SiteCarrier
from hra_fx.carrier.swap import is_outermost, unswap
from hra_fx.errors import AdapterError, FoldError
from hra_fx.reflection import Reflection
from hra_fx.site import REFLECTION
from hra_fx.tied import tied_to
from hra_fx.trainable import Changes

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class FoldedLayer:
    """One weight of a fold that has been computed and not been written.

    Attributes:
        path: the layer.
        weight: the new weight, in the shape and dtype of the old one.
        rounding: `|W'' - W'|_F / |W'|_F`, what the cast from float64 to that dtype costs.
        change: `|W' - W|_F / |W|_F`, how far the adapter moved the weight.
    """

    path: str
    weight: Tensor = field(repr=False)
    rounding: float
    change: float


class FoldPlan:
    """All folded weights of a model, found finite, before the first is written.

    Attributes:
        layers: one `FoldedLayer` for each distinct layer.
    """

    def __init__(self, model: nn.Module, layers: list[FoldedLayer]) -> None:
        """A plan for `model` as it is now."""
        self.layers = layers
        self._model = model
        self._versions = _versions(model)

    def __str__(self) -> str:
        """One line a layer: how far the weight moves, and what rounding to its dtype costs."""
        width = max((len(layer.path) for layer in self.layers), default=5)
        lines = (f"{layer.path:<{width}}  {layer.change:8.4f}  {layer.rounding:.1e}" for layer in self.layers)
        return "\n".join([f"{'layer':<{width}}  {'change':>8}  rounding", *lines])

    def apply(self) -> nn.Module:
        """Write the weights and take the reflections, regions and classes off; returns the model.

        Raises:
            FoldError: weights or vectors changed since the plan was made.
        """
        if _versions(self._model) != self._versions:
            raise FoldError("the model changed since the fold was planned. Plan again.")
        sites = sites_of(self._model)
        with torch.no_grad():
            for layer in self.layers:
                sites[layer.path].weight.copy_(layer.weight)
        for site in sites.values():
            unswap(site)
            del site._modules[REFLECTION]
        for module in regions_of(self._model).values():
            unswap(module)
            del vars(module)["_hra_region"]
        for part in self._model.modules():
            if record := record_of(part):
                Changes(record.requires_grad).restore(part)
                drop_record(part)
        return self._model


def fold(model: M, adapter_names: str | Sequence[str] | None = None) -> M:
    """Fold the reflections into the weights, `W <- W Q`, in place; the model is a plain base model again.

    Classes, graph, `state_dict` keys and `requires_grad` are those from before `transform`; only weights differ. All
    new weights are computed, in float64 where the device has it, and found finite before the first is written.
    `plan_fold` does the first half, and shows what rounding costs each layer.

    Args:
        model: a transformed model.
        adapter_names: which adapters to fold, one name or several; `None` for all.

    Returns:
        `model`.

    Raises:
        AdapterError: the model has no reflections, or not these.
        FoldError: a weight cannot be folded: tied to another tensor, without data, not finite, or with dependent
            Gram-Schmidt vectors. The model is as it was.

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
    # Where parts were folded one by one, the whole has nothing left but its region and its record.
    sites = sites_of(model) if regions_of(model) or record_of(model) else require_sites(model)
    _check_names(sites, [adapter_names] if isinstance(adapter_names, str) else adapter_names)
    for path, module in [*sites.items(), *regions_of(model).items()]:
        if not is_outermost(module):
            raise FoldError(
                f"{path or 'the model'}: another tool put a class of its own over it ({type(module).__name__}). Take "
                "that off first (for FSDP: gather the weights into a plain model)."
            )
    ties = tied_to(model, {f"{path}.weight".lstrip("."): layer.weight for path, layer in sites.items()})
    for name, others in ties.items():
        raise FoldError(
            f"{name}: it shares its memory with {', '.join(others)}, which the fold would change too. Untie it first "
            "(layer.weight = torch.nn.Parameter(layer.weight.detach().clone()), and "
            "config.tie_word_embeddings = False), or leave the layer out with exclude_modules."
        )
    return FoldPlan(model, [_folded(path, layer) for path, layer in sites.items()])


def _check_names(sites: dict[str, SiteCarrier], names: Sequence[str] | None) -> None:
    present = {name for layer in sites.values() for name in layer.hra_u}
    if names is not None and set(names) != present:
        raise AdapterError(
            f"adapter_names={list(names)}: the model has {sorted(present)}. Give these, or None for all."
        )


def _folded(path: str, layer: SiteCarrier) -> FoldedLayer:
    weight = layer.weight.detach()
    if layer.weight.is_inference() or any(
        step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        raise FoldError(
            f"{path}: its weight cannot be written (made in inference mode, or expanded from fewer numbers). Replace "
            "it first: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())."
        )
    _check_vectors(path, layer.hra_u, weight)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    chain = layer.hra_u.active_chain(dtype)
    wide = weight.to(dtype).flatten(1)
    exact = wide if chain is None else householder.rotate(wide, chain.detach(), householder.compact_wy(chain.detach()))
    narrow = exact.to(weight.dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise FoldError(f"{path}: the folded weight is not finite. Look for NaN or inf in its weight and in hra_u.")
    rounding, change = _relative(narrow.to(dtype) - exact, exact), _relative(exact - wide, wide)
    return FoldedLayer(path, narrow.view_as(weight), rounding, change)


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.matrix_norm(whole))
    return float(torch.linalg.matrix_norm(difference)) / size if size else 0.0


def _check_vectors(path: str, reflection: Reflection, weight: Tensor) -> None:
    for name in reflection.active:
        vectors = reflection[name]
        if vectors.is_meta or weight.is_meta:
            raise FoldError(f"{path}: its weight or its vectors {name!r} are on the meta device. Load them first.")
        if reflection.specs[name].apply_GS and householder.dependence(vectors) < 8 * torch.finfo(vectors.dtype).eps:
            raise FoldError(
                f"{path}: the vectors of {name!r} are linearly dependent, and Gram-Schmidt of such vectors is noise. "
                "Train with apply_GS=False, or with init_weights=True from hra_fx, which starts them apart."
            )


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Identity and version of every tensor that a fold reads; a tensor made in inference mode has no version."""
    sites = sites_of(model).values()
    read = (t for layer in sites for t in (layer.weight, *layer.hra_u.parameters(), *layer.hra_u.buffers()))
    return [(id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in read]
