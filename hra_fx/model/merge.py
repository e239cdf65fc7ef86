"""`merge_adapter` and `unmerge_adapter`, and the folded weights `W Q` of a layer, computed in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hra_fx.compat import state_modules
from hra_fx.errors import AdapterError, FoldError, HRAWarning
from hra_fx.functional.rotate import check_foldable, rotate_weight, rows_to_weight, widest_dtype
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.quantized.libraries import quant_scheme_of
from hra_fx.layers.sharding import distribute_like, reshard
from hra_fx.layers.target import weight_entry, weight_place
from hra_fx.model.state import AdapterState, adapted_layers, check_unmerged, collect_parts, root_of
from hra_fx.model.trainable import sync_layers
from hra_fx.model.whole import check_whole
from hra_fx.selection.tied import how_to_untie, tied_to


def merge_adapter(model: nn.Module) -> None:
    """Fold the active adapters into the weights temporarily, so that a forward is as fast as the base model's.

    Every merged layer keeps a copy of its base weight in the buffer `hra_u.unmerged`, so that `unmerge_adapter`
    restores it bit for bit in every dtype. While adapters are merged, the adapted weights take twice their memory, and
    the `state_dict` contains both. A merged `state_dict` can only be loaded into a model with merged adapters. To fold
    permanently, without copies, call `fold`.

    Args:
        model: a transformed model.

    Raises:
        AdapterError: no adapter is active, or adapters are already merged.
        FoldError: the model is sharded or offloaded, or a weight cannot be folded (see `fold`), for example a quantized
            one. After any error the model is unchanged.

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
    layers = check_layers(root, state)
    with torch.inference_mode(False), torch.no_grad():
        try:
            for layer in layers:
                weight = folded_weight(layer, state.active)
                layer.hra_u.unmerged = layer.hra_base.detach().clone()
                layer.hra_base.copy_(weight)
        except BaseException:
            _restore(layers)
            raise
    state.merged = True
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
    state.merged = False
    sync_layers(collect_parts(root), state)


@torch.no_grad()
def _restore(layers: Iterable[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.hra_u.unmerged is not None:
            layer.hra_base.copy_(distribute_like(layer.hra_u.unmerged, layer.hra_base))
            layer.hra_u.unmerged = None


def folded_weight(layer: AdaptedLayer, names: Iterable[str]) -> Tensor:
    """Compute `W Q` of a layer in float64 (float32 on MPS), without any checks. The layer is not changed.

    The result has the shape and dtype of the weight. `names` are the adapters in the order of the product; a layer may
    not have all of them. If adapters are merged, `W` is the weight before the merge.
    """
    weight, adapters = base_weight(layer), layer.hra_u
    dtype = widest_dtype(weight.device)
    rows = adapters.rows(weight).to(dtype)
    chain = adapters.joint_vectors([name for name in names if name in adapters], dtype)
    folded = rows if chain is None else rotate_weight(rows, chain.detach())
    return rows_to_weight(folded.to(weight.dtype), weight, transposed=adapters.fan_in_fan_out)


def base_weight(layer: AdaptedLayer) -> Tensor:
    """The weight of a layer without its adapters, including merged ones; detached."""
    return layer.hra_base.detach() if layer.hra_u.unmerged is None else layer.hra_u.unmerged


def check_layers(root: nn.Module, state: AdapterState) -> list[AdaptedLayer]:
    """Check every layer whose weight is written when the active adapters are folded or merged. Returns the layers."""
    if state.disabled or not state.active:
        raise AdapterError(
            "no adapter is active, or all are disabled. Leave the disable_adapters block, and call hra_fx.set_adapter."
        )
    check_whole(root, "fold or merge its adapters", "writing")
    layers = {path: one for path, one in adapted_layers(root).items() if not one.hra_u.keys().isdisjoint(state.active)}
    weights = {weight_entry(path, layer): layer.hra_base for path, layer in layers.items()}
    for entry, others in tied_to(dict(state_modules(root)), weights).items():  # tied after `transform`
        raise FoldError(
            f"{entry}: it shares memory with {', '.join(others)}, which would change too. {how_to_untie(entry)}."
        )
    for path, layer in layers.items():
        _check_layer(path, layer, [name for name in state.active if name in layer.hra_u])
    return list(layers.values())


def _check_layer(path: str, layer: AdaptedLayer, names: Iterable[str]) -> None:
    """Check that adapters can be folded into a layer."""
    if scheme := quant_scheme_of(layer):
        raise FoldError(
            f"{path or 'the layer'}: its weight is quantized ({scheme.description(layer)}), and cannot be folded or "
            "merged. Save the adapter (hra_fx.save_adapter), load it into the base model without quantization "
            "(hra_fx.load_adapter), and fold there; or write it with hra_fx.save_as_lora."
        )
    owner, name = weight_place(layer)
    if name not in owner._parameters:
        raise FoldError(f"{path}: another tool computes its {name} (pruning, weight_norm). Undo that first.")
    weight, tensors = base_weight(layer), [layer.hra_u[name] for name in names]
    for name, vectors in zip(names, tensors, strict=True):
        check_foldable(path, weight, vectors, apply_GS=layer.hra_u.specs[name].apply_GS, adapter=name)
    # An orthogonal `Q` keeps the lengths of rows, so no entry of `W Q` is larger than the longest row of `W`.
    dtype = widest_dtype(weight.device)
    longest = torch.linalg.vector_norm(layer.hra_u.rows(weight), dim=-1, dtype=dtype).amax()
    if not (longest < torch.finfo(weight.dtype).max and all(bool(one.isfinite().all()) for one in tensors)):
        raise FoldError(f"{path}: its weight or vectors are not finite, or too large for {weight.dtype}.")
