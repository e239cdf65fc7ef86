"""`from_peft`: convert a model with PEFT's HRA layers to hra_fx."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.api.peft_model import as_hra_model, check_names
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.peft_layers import is_peft_hra_layer, is_peft_layer
from hra_fx.layers.trained_copies import own_tensors
from hra_fx.model.delete import remove_adapters
from hra_fx.model.setup import add_filled_adapter, checked, set_up
from hra_fx.model.state import collect_parts, get_state
from hra_fx.model.switch import disable_adapters, set_adapter
from hra_fx.model.trainable import set_requires_grad
from hra_fx.selection.select import select, without_unmatched


def from_peft(model: nn.Module) -> Any:
    """Convert a model with PEFT's HRA layers to hra_fx in place, with the same adapters.

    PEFT's layers are replaced by those of hra_fx. All adapters keep their vectors, trained modules and biases, and
    their state: which are active (and in which order), which are trainable, and whether they are disabled. The vectors
    keep their memory but become new parameters, so create the optimizer after this call.

    Args:
        model: a `peft.PeftModel`, or a model that PEFT has added layers to (`add_adapter` of transformers). Do not use
            the `PeftModel` afterwards.

    Returns:
        The base model, as an `HRAModel`.

    Raises:
        AdapterError: the model has no HRA layers of PEFT, has layers of other PEFT methods, or has merged adapters.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> import peft
        >>> wrapped = peft.get_peft_model(
        ...     nn.Sequential(nn.Linear(6, 4)), peft.HRAConfig(r=2, target_modules=["0"], init_weights=False)
        ... )
        >>> x = torch.ones(3, 6)
        >>> wanted = wrapped(x)
        >>> bool(torch.allclose(from_peft(wrapped)(x), wanted, atol=1e-6))
        True
    """
    get_base: Any = getattr(model, "get_base_model", None)
    base = get_base() if callable(get_base) else model
    if not isinstance(base, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    root: Any = base
    layers: dict[str, Any] = {path: part for path, part in root.named_modules() if is_peft_layer(part)}
    _check(root, layers)
    wrappers: dict[str, Any] = {
        path: part for path, part in root.named_modules() if {"original_module", "modules_to_save"} <= {*part._modules}
    }
    configs = {name: checked(root, config, name) for name, config in root.peft_config.items()}
    vectors: dict[str, dict[str, Tensor]] = {
        name: {path: layer.hra_u[name] for path, layer in layers.items() if name in layer.hra_u} for name in configs
    }
    trained = {name: any(u.requires_grad for u in held.values()) for name, held in vectors.items()}
    first = next(iter(layers.values()))
    active, disabled = tuple(name for name in first.active_adapters if name in configs), first.disable_adapters
    with torch.inference_mode(False), ExitStack() as undo:
        _take_out(root, layers.values(), wrappers.values(), undo)
        check_names(root)
        undo.callback(_remove_all, root)
        for name, config in configs.items():
            _add(root, name, config, vectors[name], _trained_tensors(wrappers, name))
        set_adapter(root, active)
        parts = collect_parts(root)
        for name in configs:
            set_requires_grad(parts, (name,), trained[name])
        if disabled:
            disable_adapters(root)
        undo.pop_all()
    return as_hra_model(root)


def _check(root: nn.Module, layers: Mapping[str, Any]) -> None:
    if get_state(root):
        raise AdapterError(
            f"{type(root).__name__} already has hra_fx adapters. Only models without them can be converted."
        )
    if not layers:
        raise AdapterError(
            f"{type(root).__name__} has no PEFT adapters. To add one of hra_fx, call hra_fx.transform(model, config)."
        )
    for path, layer in layers.items():
        if not is_peft_hra_layer(layer):
            raise AdapterError(
                f"{path}: this layer is from another PEFT method ({type(layer).__name__}). Only HRA can be converted. "
                "Call `merge_and_unload()` or `unload()` on the PEFT model, then hra_fx.transform."
            )
        if layer.merged_adapters:
            raise AdapterError(
                f"{path}: adapters {list(layer.merged_adapters)} are merged. First call unmerge_adapter() on the PEFT "
                "model."
            )


def _trained_tensors(wrappers: Mapping[str, Any], name: str) -> dict[tuple[str, str], Tensor]:
    """(path of the module, name of its tensor) -> the tensor in an adapter's copies of `modules_to_save`."""
    return {
        (f"{path}.{below}".rstrip("."), entry): getattr(owner, entry)
        for path, wrapper in wrappers.items()
        if name in wrapper.modules_to_save
        for below, owner in wrapper.modules_to_save[name].named_modules()
        for entry in own_tensors(owner)
    }


def _take_out(root: nn.Module, layers: Iterable[Any], wrappers: Iterable[Any], undo: ExitStack) -> None:
    """Replace PEFT's modules with those of the base model."""
    replaced = {layer: layer.base_layer for layer in layers} | {one: one.original_module for one in wrappers}
    for parent in [module for module in root.modules() if module not in replaced]:
        for name, child in parent._modules.items():
            if child in replaced:
                undo.callback(setattr, parent, name, child)
                setattr(parent, name, replaced[child])
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(root):
            undo.callback(vars(root).__setitem__, name, vars(root).pop(name))


def _add(
    root: nn.Module,
    name: str,
    config: HRAConfig,
    vectors: Mapping[str, Tensor],
    copies: Mapping[tuple[str, str], Tensor],
) -> None:
    """Add an adapter with the vectors of its layers, by path, and the tensors that it trains in modules."""
    config = without_unmatched(root, config)
    if odd := sorted(select(root, config).keys() ^ vectors.keys()):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, which was changed in PEFT."
        )

    def fill(path: str, layer: nn.Module, reflection: HouseholderAdapters) -> None:
        spec = AdapterSpec(vectors[path].shape[1], config.apply_GS, init_weights=False)
        reflection.put(name, spec, vectors[path].detach(), None)

    state = get_state(root)
    if state is None:
        set_up(root, config, name, fill, copies, root_class=root_class_for(root))
    else:
        add_filled_adapter(root, state, name, config, fill, copies)


def _remove_all(root: nn.Module) -> None:
    if state := get_state(root):
        remove_adapters(root, state, tuple(state.configs))
