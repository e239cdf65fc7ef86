"""Rotated weights, `W Q`: computed in float64 and found finite before any is written. For `fold` and for merging."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hra_fx import householder
from hra_fx.adapted import regions_of
from hra_fx.carrier.layer import SiteCarrier
from hra_fx.carrier.swap import is_outermost
from hra_fx.errors import FoldError
from hra_fx.offloaded import why_absent
from hra_fx.reflection import Reflection
from hra_fx.sharded import first_sharded
from hra_fx.tied import tied_to


@dataclass(frozen=True)
class FoldedLayer:
    """One weight of a fold that has been computed and not been written.

    Attributes:
        path: the layer.
        weight: the new weight, in the shape and dtype of the old one.
        rounding: `|W'' - W'|_F / |W'|_F`, what the cast from float64 to that dtype costs.
        change: `|W' - W|_F / |W|_F`, how far the adapter moved the weight.
        untied: names of the tensors that the old weight shares memory with; the new one gets its own.
    """

    path: str
    weight: Tensor = field(repr=False)
    rounding: float
    change: float
    untied: tuple[str, ...] = ()


def check_classes(model: nn.Module, sites: Mapping[str, SiteCarrier]) -> None:
    """Refuse to write weights whose class another tool has covered.

    Raises:
        FoldError: there is one.
    """
    if absent := why_absent(model):
        raise FoldError(absent)
    if sharded := first_sharded(model):
        raise FoldError(
            f"{sharded[0]}: {sharded[1]} shares its parameters out among processes, and no process has a whole weight. "
            "Save the adapter (hra_fx.save_adapter, in every process), and fold it into a plain model, or into the "
            "checkpoint (hra_fx.fold_checkpoint)."
        )
    for path, module in [*sites.items(), *regions_of(model).items()]:
        if not is_outermost(module):
            raise FoldError(
                f"{path or 'the model'}: another tool put a class of its own over it ({type(module).__name__}). Take "
                "that off first (for FSDP: gather the weights into a plain model)."
            )


def check_weights(model: nn.Module, sites: Mapping[str, SiteCarrier]) -> None:
    """Refuse to write in place where other tensors share the memory, or where `check_classes` refuses.

    Raises:
        FoldError: there is such a weight.
    """
    check_classes(model, sites)
    for path, others in ties_of(model, sites).items():
        name = sites[path].hra_u.weight_name
        full = f"{path}.{name}".lstrip(".")
        raise FoldError(
            f"{full}: it shares its memory with {', '.join(others)}, which a merge would change too, for it writes in "
            f"place. Untie it first (layer.{name} = torch.nn.Parameter(layer.{name}.detach().clone()), and "
            "config.tie_word_embeddings = False); or call hra_fx.fold, which unties it."
        )


def ties_of(model: nn.Module, sites: Mapping[str, SiteCarrier]) -> dict[str, list[str]]:
    """Path -> names of the tensors that share memory with a site's weight, where there are some."""
    names = {path: f"{path}.{layer.hra_u.weight_name}".lstrip(".") for path, layer in sites.items()}
    found = tied_to(model, {names[path]: layer.hra_base for path, layer in sites.items()})
    return {path: found[name] for path, name in names.items() if name in found}


def rotated(path: str, layer: SiteCarrier, names: Iterable[str], untied: Iterable[str] = ()) -> FoldedLayer:
    """The weight of a layer, as it was before any merge, with the product of some adapters in it.

    Args:
        path: the layer's path, for errors.
        layer: the layer.
        names: adapters in the order of the product; one that the layer does not have is left out.
        untied: names of the tensors that share its memory.

    Raises:
        FoldError: the weight cannot be written, holds no data, or would not be finite.
    """
    weight = layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged
    if layer.hra_base.is_inference() or any(
        step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        raise FoldError(
            f"{path}: its weight cannot be written (made in inference mode, or expanded from fewer numbers). Replace "
            "it first: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())."
        )
    here = [name for name in names if name in layer.hra_u]
    _check_vectors(path, layer.hra_u, here, weight)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    chain = layer.hra_u.joint_chain(here, dtype)
    wide = layer.hra_u.rows(weight.to(dtype))
    exact = wide if chain is None else householder.rotate(wide, chain.detach(), householder.compact_wy(chain.detach()))
    narrow = exact.to(weight.dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise FoldError(f"{path}: the folded weight is not finite. Look for NaN or inf in its weight and in hra_u.")
    rounding, change = _relative(narrow.to(dtype) - exact, exact), _relative(exact - wide, wide)
    return FoldedLayer(path, layer.hra_u.shaped(narrow, weight), rounding, change, tuple(untied))


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(torch.linalg.matrix_norm(whole))
    return float(torch.linalg.matrix_norm(difference)) / size if size else 0.0


def _check_vectors(path: str, reflection: Reflection, names: Iterable[str], weight: Tensor) -> None:
    for name in names:
        vectors = reflection[name]
        if vectors.is_meta or weight.is_meta:
            raise FoldError(f"{path}: its weight or its vectors {name!r} are on the meta device. Load them first.")
        if reflection.specs[name].apply_GS and householder.dependence(vectors) < 8 * torch.finfo(vectors.dtype).eps:
            raise FoldError(
                f"{path}: the vectors of {name!r} are linearly dependent, and Gram-Schmidt of such vectors is noise. "
                "Train with apply_GS=False, or with init_weights=True from hra_fx, which starts them apart."
            )
