"""`from_peft`: convert a model with PEFT's HRA layers to hra_fx."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.api.peft_model import HRAModel, as_hra_model, check_names
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.integrations.pretrained import root_class_for
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.peft_layers import is_peft_hra_layer, is_peft_layer
from hra_fx.layers.trained_copies import own_tensors
from hra_fx.model.add import add_filled_adapter
from hra_fx.model.delete import remove_adapters
from hra_fx.model.setup import checked, set_up
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
    root = _base_model(model)
    found = _collect(root)
    with torch.inference_mode(False), ExitStack() as undo:
        _take_out(root, found, undo)
        check_names(root, HRAModel)
        undo.callback(_remove_all, root)
        for name, config in found.configs.items():
            _add(root, name, config, found)
        set_adapter(root, found.active)
        parts = collect_parts(root)
        for name in found.configs:
            set_requires_grad(parts, (name,), found.trained[name])
        if found.disabled:
            disable_adapters(root)
        undo.pop_all()
    return as_hra_model(root)


@dataclass(frozen=True)
class _Found:
    """What PEFT has added to a model.

    Attributes:
        configs: adapter name -> configuration.
        replaced: layer or wrapper of PEFT -> the module of the base model inside it.
        vectors: adapter name -> path of the layer -> `U: (d, r)`.
        copies: adapter name -> (path of the module, name of its tensor) -> trained tensor.
        active: names of the active adapters, in order.
        trained: adapter name -> whether it is trained.
        disabled: whether adapters are disabled.
    """

    configs: dict[str, HRAConfig]
    replaced: dict[nn.Module, nn.Module]
    vectors: dict[str, dict[str, Tensor]]
    copies: dict[str, dict[tuple[str, str], Tensor]]
    active: tuple[str, ...]
    trained: dict[str, bool]
    disabled: bool


def _base_model(model: Any) -> nn.Module:
    """The base model, which contains PEFT's layers."""
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    if not isinstance(base, nn.Module):
        raise AdapterError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    return base


def _collect(root: Any) -> _Found:
    layers: dict[str, Any] = {path: part for path, part in root.named_modules() if is_peft_layer(part)}
    _check(root, layers)
    first = next(iter(layers.values()))
    configs = {name: checked(root, config, name) for name, config in root.peft_config.items()}
    wrappers: dict[str, Any] = {
        path: part for path, part in root.named_modules() if {"original_module", "modules_to_save"} <= {*part._modules}
    }
    vectors = {
        name: {path: layer.hra_u[name] for path, layer in layers.items() if name in layer.hra_u} for name in configs
    }
    return _Found(
        configs=configs,
        replaced={
            **{layer: layer.base_layer for layer in layers.values()},
            **{wrapper: wrapper.original_module for wrapper in wrappers.values()},
        },
        vectors=vectors,
        copies={name: _trained_tensors(wrappers, name) for name in configs},
        active=tuple(name for name in first.active_adapters if name in configs),
        trained={name: any(u.requires_grad for u in held.values()) for name, held in vectors.items()},
        disabled=first.disable_adapters,
    )


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


def _take_out(root: nn.Module, found: _Found, undo: ExitStack) -> None:
    """Replace PEFT's modules by those of the base model."""
    for parent in [module for module in root.modules() if module not in found.replaced]:
        for name, child in parent._modules.items():
            if child in found.replaced:
                undo.callback(setattr, parent, name, child)
                setattr(parent, name, found.replaced[child])
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(root):
            undo.callback(vars(root).__setitem__, name, vars(root).pop(name))


def _add(root: nn.Module, name: str, config: HRAConfig, found: _Found) -> None:
    config, vectors = without_unmatched(root, config), found.vectors[name]
    if odd := sorted(select(root, config).keys() ^ vectors.keys()):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, which was changed in PEFT."
        )

    def fill(path: str, layer: nn.Module, reflection: HouseholderAdapters) -> None:
        spec = AdapterSpec(vectors[path].shape[1], config.apply_GS, init_weights=False)
        reflection.put(name, spec, vectors[path].detach(), None)

    record = get_state(root)
    if record is None:
        set_up(root, config, name, fill, found.copies[name], root_class=root_class_for(root))
    else:
        add_filled_adapter(root, record, name, config, fill, found.copies[name])


def _remove_all(root: nn.Module) -> None:
    if record := get_state(root):
        remove_adapters(root, record, tuple(record.configs))
