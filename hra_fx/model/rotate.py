"""Rotated weights, `W Q`: computed in float64 and found finite before any is written. For `fold` and for merging.

A quantised weight is dequantised for it, and quantised anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hra_fx.errors import FoldError
from hra_fx.functional import householder
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.class_swap import is_outermost
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.quantized.scheme import Packing
from hra_fx.layers.sharding import first_sharded
from hra_fx.model.offload import why_absent
from hra_fx.model.tied import tied_to

# A change of a weight that is the rounding of the product: its adapter has not been trained.
_NOTHING = 1e-12
#: What else there is to do with a quantised weight that is to be rotated.
WAY_OUT = (
    "Without loss: save the adapter (hra_fx.save_adapter), load it over the model before quantisation "
    "(hra_fx.load_adapter), and fold that."
)


@dataclass(frozen=True)
class FoldedLayer:
    """One weight of a fold that has been computed and not been written.

    Attributes:
        path: the layer.
        weight: the new weight, in the shape and dtype of the old one; a parameter to put in its place, where that is
            quantised.
        rounding: `|W'' - W'|_F / |W'|_F`, what the cast from float64 to that dtype, or quantising it, costs.
        change: `|W' - W|_F / |W|_F`, how far the adapter moved the weight.
        untied: names of the tensors that the old weight shares memory with; the new one gets its own.
        quantized: how the weight is quantised, in words; empty where it is not.
    """

    path: str
    weight: Tensor = field(repr=False)
    rounding: float
    change: float
    untied: tuple[str, ...] = ()
    quantized: str = ""


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
    for path, module in sites.items():
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


def check_floating(sites: Mapping[str, SiteCarrier], names: Iterable[str], ask: str = "") -> None:
    """Refuse to rotate quantised weights by the way.

    Args:
        sites: path -> layer.
        names: the adapters that are to go into the weights.
        ask: how to ask for it, a sentence.

    Raises:
        FoldError: there are such weights, and one of the adapters is at them.
    """
    going = set(names)
    here = {path: layer for path, layer in sites.items() if going & set(layer.hra_u)}
    found = {path: packing for path, layer in here.items() if (packing := packing_of(layer))}
    if not found:
        return
    path, packing = next(iter(found.items()))
    others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    reason = packing.why_not_repacked(here[path])
    anew = "once rotated it would have to be quantised anew, by which it moves once more"
    raise FoldError(
        f"{path or 'the layer'}{others}: its weight is quantised ({packing.words(here[path])}), and {reason or anew}."
        f"{'' if reason else ask} {WAY_OUT}"
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
    here = [name for name in names if name in layer.hra_u]
    if packing := packing_of(layer):
        return _quantized(path, layer, here, tuple(untied), packing)
    if layer.hra_base.is_inference() or any(
        step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        raise FoldError(
            f"{path}: its weight cannot be written (made in inference mode, or expanded from fewer numbers). Replace "
            "it first: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())."
        )
    _check_vectors(path, layer.hra_u, here, weight)
    wide, exact = _product(layer.hra_u, here, layer.hra_u.rows(weight))
    narrow = exact.to(weight.dtype)
    rounding, change = _sizes(path, narrow, exact, wide)
    return FoldedLayer(path, layer.hra_u.shaped(narrow, weight), rounding, change, tuple(untied))


def _quantized(
    path: str, layer: SiteCarrier, here: list[str], untied: tuple[str, ...], packing: Packing
) -> FoldedLayer:
    words = packing.words(layer)
    if not here:  # quantised anew it would not always be the same
        return FoldedLayer(path, layer.hra_base, 0.0, 0.0, quantized=words)
    if reason := packing.why_not_repacked(layer):
        raise FoldError(f"{path or 'the layer'}: its weight is quantised ({words}), and {reason}. {WAY_OUT}")
    values = packing.values(layer)
    _check_vectors(path, layer.hra_u, here, values)
    wide, exact = _product(layer.hra_u, here, values)
    if _relative(exact - wide, wide) < _NOTHING:
        return FoldedLayer(path, layer.hra_base, 0.0, 0.0, quantized=words)
    repacked = packing.repacked(layer, exact)
    rounding, change = _sizes(path, repacked.values, exact, wide)
    return FoldedLayer(path, repacked.weight, rounding, change, untied, words)


def _product(reflection: Reflection, names: list[str], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in float64, where the device has it, and their product with `Q`."""
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    chain = reflection.joint_chain(names, dtype)
    wide = rows.to(dtype)
    if chain is None:
        return wide, wide
    return wide, householder.rotate(wide, chain.detach(), householder.compact_wy(chain.detach()))


def _sizes(path: str, narrow: Tensor, exact: Tensor, wide: Tensor) -> tuple[float, float]:
    """What the new weight costs in rounding, and how far it is from the old one.

    Raises:
        FoldError: it is not finite.
    """
    if not bool(torch.isfinite(narrow).all()):
        raise FoldError(f"{path}: the folded weight is not finite. Look for NaN or inf in its weight and in hra_u.")
    return _relative(narrow.to(exact.dtype) - exact, exact), _relative(exact - wide, wide)


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
