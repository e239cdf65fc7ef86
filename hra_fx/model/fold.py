"""Fold the active adapters into the weights of a module: check everything first, then write layer by layer."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from hra_fx.errors import FoldError, HRAWarning
from hra_fx.layers.peft_layers import is_of_peft
from hra_fx.layers.trained_copies import all_copies, copies_of
from hra_fx.model.merge import check_layers, folded_weight, unmerge_adapter
from hra_fx.model.remove import remove_adapters
from hra_fx.model.state import root_of, unwrap
from hra_fx.model.trainable import tied_groups

M = TypeVar("M", bound=nn.Module)
#: The setting of a configuration that makes transformers tie weights when it loads a model.
_TIE = "tie_word_embeddings"


def fold(model: M) -> M:
    """Fold the active adapters into the weights in place, `W <- W Q`, and remove all adapters.

    The model is then a plain model, with the classes, graph, `state_dict` keys and `requires_grad` flags from before
    `transform`. Only the values of the folded weights, and of tensors trained through `bias` and `modules_to_save`,
    differ. All layers are checked first. Then the weights are written one at a time, computed in float64 if the device
    supports it.

    If `modules_to_save` trained one of two tied weights, `config.tie_word_embeddings` is set to False, and all tensors
    that shared memory get their own. A quantized weight cannot be folded: fold into the base model without
    quantization, or call `save_as_lora`.

    Args:
        model: a transformed model.

    Returns:
        `model`, or the base model in a `PeftModel` of `from_peft`.

    Raises:
        AdapterError: the model has no adapters, or no adapter is active.
        FoldError: the model is sharded or offloaded, or a weight cannot be folded: it has no data, is quantized or not
            finite, has linearly dependent Gram-Schmidt vectors, or was tied to another tensor after `transform`. No
            weight was changed.

    Warns:
        HRAWarning: adapters that are not active are removed, or `config.tie_word_embeddings` is set to False.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 8)), HRAConfig(r=2, target_modules=["0"]))
        >>> list(fold(model).state_dict())
        ['0.weight', '0.bias']
    """
    root, state = root_of(model)
    names, layers = state.active, check_layers(root, state)
    for (path, _), tensor in (item for name in names for item in copies_of(root, name).items()):
        if isinstance(tensor, nn.Parameter) and not bool(torch.isfinite(tensor).all()):
            raise FoldError(f"{path}: its trained copy is not finite. Load a checkpoint from before it diverged.")
    settings = _tie_settings(root, names)
    with torch.inference_mode(False), torch.no_grad():
        if state.merged:
            unmerge_adapter(root)
        # Each layer drops its adapters when its weight is written. So if memory runs out, the model still computes the
        # same outputs, and another fold finishes the work.
        for layer in layers:
            layer.hra_base.copy_(folded_weight(layer, names))
            for name in names:
                layer.hra_u.remove(name)
    for owner, copies in all_copies(root).values():
        for name in names:
            copies.promote_to_base(owner, name)
    dropped = [name for name in state.configs if name not in names]
    remove_adapters(root, state, tuple(state.configs))
    for config in settings:
        setattr(config, _TIE, False)
    if settings:
        text = f"a trained copy of a tied weight was folded, so config.{_TIE} is now False."
        warnings.warn(text, HRAWarning, stacklevel=2)
    if dropped:
        text = f"adapters {dropped} were not active and are removed."
        warnings.warn(text, HRAWarning, stacklevel=2)
    return unwrap(model) if is_of_peft(model) else model


def _tie_settings(root: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """The configurations that would tie weights again which differ once the copies of these adapters are folded.

    Raises a `FoldError` if other weights would stay tied, because the setting is for all of them.
    """
    groups = [list(group.values()) for group in tied_groups(root, names)]
    if all(len(set(tensors)) == 1 for tensors in groups):
        return []
    configs = [getattr(part, "config", None) for part in root.modules()]
    settings = list({id(config): config for config in configs if getattr(config, _TIE, False)}.values())
    if settings and any(len(set(tensors)) < len(tensors) for tensors in groups):
        raise FoldError(
            f"{type(root).__name__}: a trained copy of one of several tied weights cannot be folded, because "
            f"config.{_TIE} applies to all of them. Save the adapter (hra_fx.save_adapter) and load it over the base "
            "model."
        )
    return settings
