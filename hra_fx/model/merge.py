"""`merge_adapter` and `unmerge_adapter`, and the folded weights `W Q` of a layer, computed in float64."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from hra_fx.compat import state_modules
from hra_fx.errors import AdapterError, FoldError, HRAWarning
from hra_fx.functional.rotate import check_finite, check_foldable, rotate_weight, rows_to_weight
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.layers.sharding import distribute_like, reshard
from hra_fx.layers.target import weight_entry, weight_place
from hra_fx.model.state import AdapterState, adapted_layers, check_unmerged, collect_parts, names_in, root_of
from hra_fx.model.trainable import sync_layers
from hra_fx.model.whole import check_whole
from hra_fx.selection.tied import how_to_untie, tied_to


def merge_adapter(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> None:
    """Fold adapters into the weights temporarily, `W <- W Q`, so that a forward is as fast as the base model's.

    Every merged layer keeps a copy of its base weight in the buffer `hra_u.unmerged`, so that `unmerge_adapter`
    restores it bit for bit in every dtype. While adapters are merged, the adapted weights take twice their memory, and
    the `state_dict` contains both. A merged `state_dict` can only be loaded into a model with merged adapters. To fold
    permanently, without copies, call `fold`.

    Args:
        model: a transformed model.
        adapter_names: the active adapters to merge, which must be the first ones in the product; `None` for all.

    Raises:
        AdapterError: the model has no such adapter, no adapter is active, adapters are already merged, or another
            adapter comes earlier in the product; or the model is sharded or offloaded.
        FoldError: a weight cannot be folded (see `fold`), for example a quantized one. After any error the model is
            unchanged.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> before = model[0].weight.clone()
        >>> merge_adapter(model)
        >>> unmerge_adapter(model)
        >>> bool((model[0].weight == before).all())
        True
    """
    root, state = root_of(model)
    check_unmerged(state)
    names = first_in_product(state, adapter_names)
    layers = adapted_layers(root)
    present = check_layers(root, layers, names)
    with torch.inference_mode(False), torch.no_grad():
        try:
            for path, here in present.items():
                layer = layers[path]
                weight = folded_weight(layer, here)
                layer.hra_u.unmerged = layer.hra_base.detach().clone()
                layer.hra_base.copy_(weight)
        except BaseException:
            _restore(layers.values())
            raise
    state.merged = names
    sync_layers(collect_parts(root), state)


def unmerge_adapter(model: nn.Module) -> None:
    """Restore the weights from before `merge_adapter`, bit for bit. The forward then computes the adapters again.

    Raises:
        AdapterError: the model has no adapters.

    Warns:
        HRAWarning: no adapter is merged.
    """
    root, state = root_of(model)
    if not state.merged:
        warnings.warn("no adapter is merged; unmerge_adapter does nothing.", HRAWarning, stacklevel=2)
        return
    reshard(model.modules())
    _restore(adapted_layers(root).values())
    state.merged = ()
    sync_layers(collect_parts(root), state)


def first_in_product(state: AdapterState, adapter_names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The active adapters to fold into the weights, in the order of the product; `None` means all of them."""
    if state.disabled:
        raise AdapterError(
            "adapters are disabled. Leave the disable_adapters block, or call set_adapter or enable_adapter_layers()."
        )
    names = state.active if adapter_names is None else names_in(state, adapter_names)
    if not names:
        raise AdapterError("no adapter is active. Name one, or call hra_fx.set_adapter first.")
    if names != state.active[: len(names)]:
        raise AdapterError(
            f"adapters {list(names)} cannot be folded first: the active adapters are {list(state.active)}, in the "
            "order of the product. Fold the first ones of that order, or set other adapters with hra_fx.set_adapter."
        )
    return names


@torch.no_grad()
def _restore(layers: Iterable[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.hra_u.unmerged is not None:
            layer.hra_base.copy_(distribute_like(layer.hra_u.unmerged, layer.hra_base))
            layer.hra_u.unmerged = None


def folded_weight(layer: AdaptedLayer, names: Iterable[str]) -> Tensor:
    """Compute `W Q` of a layer in float64 (float32 on MPS), without any checks. The layer is not changed.

    The result has the shape and dtype of the weight. `names` are in the order of the product. If adapters are merged,
    `W` is the weight before the merge.
    """
    weight, adapters = base_weight(layer), layer.hra_u
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    rows = adapters.rows(weight).to(dtype)
    chain = adapters.joint_vectors(names, dtype)
    folded = rows if chain is None else rotate_weight(rows, chain.detach())
    return rows_to_weight(folded.to(weight.dtype), weight, transposed=adapters.fan_in_fan_out)


def base_weight(layer: AdaptedLayer) -> Tensor:
    """The weight of a layer without its adapters, including merged ones; detached."""
    return layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged


def check_layers(
    root: nn.Module, layers: Mapping[str, AdaptedLayer], names: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Check every layer whose weight is written. Returns its adapters in the order of the product, for each path."""
    present = {path: tuple(name for name in names if name in layer.hra_u) for path, layer in layers.items()}
    written = {path: here for path, here in present.items() if here}
    check_whole(root, "fold or merge its adapters", "writing")
    weights = {weight_entry(path, layers[path]): layers[path].hra_base for path in written}
    for entry, others in tied_to(dict(state_modules(root)), weights).items():  # tied after `transform`
        raise FoldError(
            f"{entry}: it shares memory with {', '.join(others)}, which would change too. {how_to_untie(entry)}."
        )
    for path, here in written.items():
        _check_layer(path, layers[path], here)
    return written


def _check_layer(path: str, layer: AdaptedLayer, names: Collection[str]) -> None:
    """Check that adapters can be folded into a layer.

    An orthogonal `Q` keeps the lengths of rows, so no entry of `W Q` is larger than the length of the longest row of
    `W`. `W Q` is only computed if this length exceeds the range of the dtype.
    """
    if scheme := quant_scheme_of(layer):
        raise FoldError(
            f"{path or 'the layer'}: its weight is quantized ({scheme.description(layer)}), and cannot be folded or "
            "merged. Save the adapter (hra_fx.save_adapter), load it into the base model without quantization "
            "(hra_fx.load_adapter), and fold there; or write it with hra_fx.save_as_lora."
        )
    owner, name = weight_place(layer)
    if name not in owner._parameters:
        raise FoldError(
            f"{path}: its {name} is not a parameter, because another tool computes it (pruning, weight_norm). Undo "
            "that first (prune.remove, remove_weight_norm)."
        )
    weight = layer.hra_base.detach()
    is_expanded = any(step == 0 < size - 1 for step, size in zip(weight.stride(), weight.shape, strict=True))
    if layer.hra_base.is_inference() or is_expanded:
        raise FoldError(
            f"{path}: its weight cannot be written, because it was created in inference mode or is an expanded tensor. "
            "Replace it first: layer.weight = torch.nn.Parameter(layer.weight.detach().clone())."
        )
    finite = True
    for name in names:
        vectors = layer.hra_u[name]
        check_foldable(path, weight, vectors, apply_GS=layer.hra_u.specs[name].apply_GS, adapter=name)
        finite = finite and bool(torch.isfinite(vectors).all())
    if not finite or not _fits_dtype(layer.hra_u.rows(base_weight(layer))):
        check_finite(path, folded_weight(layer, names))


def _fits_dtype(rows: Tensor) -> bool:
    """Whether every rotation of finite rows stays finite in their dtype; false for NaN and infinity."""
    dtype = torch.float32 if rows.device.type == "mps" else torch.float64
    lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    return bool((lengths < torch.finfo(rows.dtype).max).all())
