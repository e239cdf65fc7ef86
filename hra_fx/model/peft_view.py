"""Take over PEFT's HRA layers in place: for good (`from_peft`, `fold`), or while a function runs (`adapted_view`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.class_swap import SwapMixin
from hra_fx.layers.peft_layers import is_of_peft, is_peft_hra_layer, is_peft_layer
from hra_fx.layers.target import width_of
from hra_fx.layers.trained_copies import own_tensors
from hra_fx.model.remove import remove_adapters
from hra_fx.model.root import AdaptedModel
from hra_fx.model.setup import checked, put_adapter
from hra_fx.model.state import collect_parts, get_state, unwrap
from hra_fx.model.switch import disable_adapters, set_adapter
from hra_fx.model.trainable import set_requires_grad
from hra_fx.selection.select import select, without_unmatched


@contextmanager
def adapted_view(model: Any) -> Iterator[Any]:
    """Context manager with a model of PEFT as an adapted model; any other object is returned as it is.

    In the block, PEFT's HRA layers are replaced with adapted layers that have the same parameters. At its end, PEFT's
    layers are restored. For a diffusers pipeline, this applies to each part.

    Yields:
        The base model of a `PeftModel`, with the adapters; or `model`.
    """
    components = {} if isinstance(model, nn.Module) else getattr(model, "components", None)
    parts = [model, *(components.values() if isinstance(components, Mapping) else ())]
    with ExitStack() as undo:
        if parts := [part for part in parts if has_peft_layers(part)]:
            undo.enter_context(torch.inference_mode(False))
        bases = [take_over(part, undo) for part in parts]
        yield bases[0] if isinstance(model, nn.Module) and bases else without_wrapper(model)


def has_peft_layers(model: Any) -> bool:
    """Whether a model has HRA layers of PEFT."""
    return isinstance(model, nn.Module) and any(map(is_peft_hra_layer, model.modules()))


def without_wrapper(model: Any) -> Any:
    """The base model in a `PeftModel` whose layers were taken over; any other model is returned as it is."""
    inner: Any = unwrap(model)
    return inner.get_base_model() if getattr(type(inner), "_hra_is_taken_over", False) else model


def take_over(
    model: nn.Module,
    undo: ExitStack,
    root_class_for: Callable[[nn.Module], type[SwapMixin]] = lambda _: AdaptedModel,
) -> nn.Module:
    """Replace PEFT's HRA layers with adapted layers that have the same parameters; `undo` restores PEFT's layers.

    Returns:
        The base model, with all adapters and their state.

    Raises:
        AdapterError: see `hra_fx.from_peft`. The steps in `undo` restore the model.
    """
    root: Any = _root_in(model)
    layers: dict[str, Any] = {path: part for path, part in root.named_modules() if is_peft_layer(part)}
    _check(layers)
    wrappers: dict[str, Any] = {
        path: part for path, part in root.named_modules() if {"original_module", "modules_to_save"} <= {*part._modules}
    }
    configs = {name: checked(root, config, name) for name, config in root.peft_config.items()}
    vectors: dict[str, dict[str, nn.Parameter]] = {
        name: {path: layer.hra_u[name] for path, layer in layers.items() if name in layer.hra_u} for name in configs
    }
    trained = {name: any(u.requires_grad for u in held.values()) for name, held in vectors.items()}
    first = next(iter(layers.values()))
    active, disabled = [name for name in first.active_adapters if name in configs], first.disable_adapters
    # PEFT's wrappers share this dictionary. PEFT's functions raise an error for configurations of hra_fx.
    undo.callback(root.peft_config.update, dict(root.peft_config))
    root.peft_config.update(configs)
    _take_out(root, [*layers.values()], [*wrappers.values()], undo)
    for name, config in configs.items():
        _add(root, name, config, vectors[name], _trained_tensors(wrappers, name), root_class_for(root))
    set_adapter(root, active)
    set_requires_grad(collect_parts(root), trained)
    if disabled:
        disable_adapters(root)
    return root  # type: ignore[no-any-return]


def _root_in(model: nn.Module) -> nn.Module:
    """The model that PEFT has added layers to, in its wrappers."""
    if collect_parts(model).roots:
        raise AdapterError(
            f"{type(model).__name__} already has hra_fx adapters. Only models without them can be converted."
        )
    roots = [module for module in model.modules() if "peft_config" in vars(module) and not is_of_peft(module)]
    if len(roots) == 1:
        return roots[0]
    name = type(model).__name__
    if roots:
        raise AdapterError(f"{name} contains {len(roots)} models with PEFT adapters. Pass one of them.")
    if any(map(is_peft_layer, model.modules())):
        raise AdapterError(f"{name} is a part of a model with PEFT adapters. Pass the whole model.")
    raise AdapterError(f"{name} has no PEFT adapters. To add one of hra_fx, call hra_fx.transform(model, config).")


def _check(layers: Mapping[str, Any]) -> None:
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
        width = width_of(layer.base_layer)
        if odd := next((name for name, vectors in layer.hra_u.items() if len(vectors) != width), None):
            raise AdapterError(  # of a kernel that is not square
                f"{path}: PEFT's vectors of {odd!r} have length {len(layer.hra_u[odd])}, but a row of the weight has "
                f"{width} entries. Adapt this layer with hra_fx.transform."
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


def _take_out(root: nn.Module, layers: list[Any], wrappers: list[Any], undo: ExitStack) -> None:
    """Replace PEFT's modules with those of the base model. `undo` first removes what was added after this."""
    for parameter in root.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    replaced = {layer: layer.base_layer for layer in layers} | {one: one.original_module for one in wrappers}
    for parent in [module for module in root.modules() if module not in replaced]:
        for name, child in parent._modules.items():
            if child in replaced:
                undo.callback(setattr, parent, name, child)
                setattr(parent, name, replaced[child])
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(root):
            undo.callback(vars(root).__setitem__, name, vars(root).pop(name))
    undo.callback(_remove_all, root)


def _add(
    root: nn.Module,
    name: str,
    config: HRAConfig,
    vectors: Mapping[str, nn.Parameter],
    copies: Mapping[tuple[str, str], Tensor],
    root_class: type[SwapMixin],
) -> None:
    """Add an adapter with the vectors of its layers, by path, and the tensors that it trains in modules."""
    config = without_unmatched(root, config)
    if odd := sorted(select(root, config).keys() ^ vectors.keys()):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, which was changed in PEFT."
        )

    def fill(path: str, layer: nn.Module, adapters: HouseholderAdapters) -> None:
        spec = AdapterSpec(vectors[path].shape[1], config.apply_GS, config.init_weights)
        adapters.put(name, spec, vectors[path].detach())
        adapters[name] = vectors[path]  # the same parameter, so that an optimizer keeps working

    put_adapter(root, name, config, fill, copies, root_class=root_class)


def _remove_all(root: nn.Module) -> None:
    if state := get_state(root):
        remove_adapters(root, state, tuple(state.configs))
