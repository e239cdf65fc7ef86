"""Fold adapters into the weights of a module: check everything first, then write layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from hra_fx.errors import FoldError, HRAWarning
from hra_fx.layers.peft_layers import is_of_peft
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.merge import check_layers, first_in_product, folded_weight, unmerge_adapter
from hra_fx.model.remove import remove_adapters
from hra_fx.model.state import AdapterState, adapted_layers, collect_parts, root_of, unwrap
from hra_fx.model.tied import TIE_SETTING, settings_to_turn_off
from hra_fx.model.trainable import sync_layers
from hra_fx.removed import without_removed_arguments

M = TypeVar("M", bound=nn.Module)


@without_removed_arguments
def fold(model: M, adapter_names: str | Sequence[str] | None = None) -> M:
    """Fold adapters into the weights in place, `W <- W Q`. When all adapters are folded, the model is a plain model.

    It then has the classes, graph, `state_dict` keys and `requires_grad` flags from before `transform`. Only the values
    of the folded weights, and of tensors trained through `bias` and `modules_to_save`, differ. All layers are checked
    first. Then the weights are written one at a time, computed in float64 if the device supports it.

    If `modules_to_save` trained one of two tied weights, `config.tie_word_embeddings` is set to False, and all tensors
    that shared memory get their own. A quantized weight cannot be folded: fold into the base model without
    quantization, or call `save_as_lora`.

    Args:
        model: a transformed model.
        adapter_names: one or more adapters to fold, in this order; the others are kept and act on the new weights.
            `None` folds the active adapters and removes the others.

    Returns:
        `model`, or the base model in a `PeftModel` of `from_peft`.

    Raises:
        AdapterError: the model has no adapters or no adapter with one of these names, or other active adapters come
            before them in the product.
        FoldError: a weight cannot be folded: it has no data, is quantized or not finite, has linearly dependent
            Gram-Schmidt vectors, or was tied to another tensor after `transform`. No weight was changed.

    Warns:
        HRAWarning: adapters that are not active are removed, or `config.tie_word_embeddings` is set to False.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(fold(model).state_dict())
        ['0.weight', '0.bias']
    """
    root, state = root_of(model)
    names = first_in_product(state, adapter_names)
    present = check_layers(root, adapted_layers(root), names)
    for (path, _), tensor in (item for name in names for item in copies_of(root, name).items()):
        if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    settings = settings_to_turn_off(root, names)
    dropped = tuple(name for name in state.configs if name not in names) if adapter_names is None else ()
    _fold(root, state, present, names, dropped)
    for config in settings:
        setattr(config, TIE_SETTING, False)
    if settings:
        text = f"a trained copy of a tied weight was folded, so config.{TIE_SETTING} is now False."
        warnings.warn(text, HRAWarning, stacklevel=3)
    if dropped:
        text = f"adapters {list(dropped)} were not active and are removed. To keep them, pass the names to fold."
        warnings.warn(text, HRAWarning, stacklevel=3)
    return unwrap(model) if is_of_peft(model) else model


def _fold(
    root: nn.Module,
    state: AdapterState,
    present: Mapping[str, tuple[str, ...]],
    names: tuple[str, ...],
    dropped: tuple[str, ...],
) -> None:
    """Fold `present`, the adapters of each layer, and remove the adapters `dropped`.

    The folded adapters of a layer are removed as soon as its weight is written. So if memory runs out, the model still
    computes the same outputs, and another fold finishes the work.
    """
    layers = adapted_layers(root)
    with torch.inference_mode(False), torch.no_grad():
        if state.merged:
            unmerge_adapter(root)
        for path, here in present.items():
            layers[path].hra_base.copy_(folded_weight(layers[path], here))
            for name in here:
                layers[path].hra_u.remove(name)
    for owner, copies in all_copies(root).values():
        for name in names:
            copies.promote_to_base(owner, name)
    remove_adapters(root, state, (*names, *dropped))
    if state.configs:
        sync_layers(collect_parts(root), state)
