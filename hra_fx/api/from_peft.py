"""`from_peft`: replace PEFT's HRA layers with those of hra_fx, with the same parameters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.api.peft_model import HRAModel, as_hra_model
from hra_fx.api.peft_wrapper import hand_over
from hra_fx.api.pretrained import root_class_for
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.peft_layers import is_of_peft, is_peft_hra_layer, is_peft_layer, refuse_hidden_names
from hra_fx.model.remove import remove_adapters
from hra_fx.model.setup import put_adapter, valid_config
from hra_fx.model.state import adapted_layers, collect_parts, get_state
from hra_fx.model.trainable import set_requires_grad
from hra_fx.selection.select import select, without_unmatched


def from_peft(model: nn.Module) -> Any:
    """Convert a model with PEFT's HRA layers to hra_fx in place, with the same adapters.

    PEFT's layers are replaced by those of hra_fx. All adapters keep their vectors, trained modules and biases, and
    their state: which are active (and in which order), which are trainable, and whether they are disabled. Vectors and
    trained modules remain the same parameters. From now on, the parameters of even ranks contain pairs of vectors
    (`HRAConfig.pairs`). Call this before the first step of an optimizer, because its state of vectors does not fit
    pairs. Biases become copies: with `bias`, create the optimizer after this call.

    Args:
        model: a `peft.PeftModel`, a module that contains one, or a model that PEFT has added layers to (`add_adapter`
            of transformers). The methods of the `PeftModel` are afterwards those of the base model, so a Trainer that
            holds it saves and resumes the adapters.

    Returns:
        The base model, as an `HRAModel`.

    Raises:
        AdapterError: the model has no HRA layers of PEFT, has layers of other PEFT methods, or has merged adapters.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> import peft, torch
        >>> wrapped = peft.get_peft_model(
        ...     nn.Sequential(nn.Linear(6, 4)), peft.HRAConfig(r=2, target_modules=["0"], init_weights=False)
        ... )
        >>> x = torch.ones(3, 6)
        >>> wanted = wrapped(x)
        >>> bool(torch.allclose(from_peft(wrapped)(x), wanted, atol=1e-6))
        True
    """
    root = _root_in(model)
    layers: dict[str, Any] = {path: part for path, part in root.named_modules() if is_peft_layer(part)}
    _check(layers)
    wrappers: dict[str, Any] = {
        path: part for path, part in root.named_modules() if {"original_module", "modules_to_save"} <= {*part._modules}
    }
    theirs = root.peft_config  # PEFT's wrappers share this dictionary
    configs = {name: valid_config(config) for name, config in theirs.items()}
    first = next(iter(layers.values()))
    active, disabled = [name for name in first.active_adapters if name in configs], first.disable_adapters
    trained = {name: any(one.hra_u[name].requires_grad for one in _with(layers, name).values()) for name in configs}
    with torch.inference_mode(False), ExitStack() as undo:
        _take_out(root, [*layers.values()], [*wrappers.values()], undo)
        refuse_hidden_names(root, HRAModel)
        for name, config in configs.items():
            vectors = {path: layer.hra_u[name] for path, layer in _with(layers, name).items()}
            _add(root, name, config, vectors, _trained_tensors(wrappers, name))
        adapted: Any = as_hra_model(root)
        adapted.set_adapter(active)
        undo.pop_all()
    theirs.update(configs)  # PEFT's functions raise an error for configurations of hra_fx
    set_requires_grad(collect_parts(root), trained)
    if disabled:
        adapted.disable_adapter_layers()
    hand_over(model, root)
    _train_pairs(root, configs)
    return adapted


def _root_in(model: nn.Module) -> Any:
    """The model that PEFT has added layers to, in its wrappers."""
    name = type(model).__name__
    if collect_parts(model).roots:
        raise AdapterError(f"{name} already has hra_fx adapters. Only models without them can be converted.")
    roots = [part for part in model.modules() if "peft_config" in vars(part) and not is_of_peft(part)]
    if len(roots) != 1:
        raise AdapterError(
            f"{name} contains {len(roots)} models with PEFT adapters. Pass one whole model that has them; to add an "
            "adapter of hra_fx, call hra_fx.transform(model, config)."
        )
    return roots[0]


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


def _with(layers: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {path: layer for path, layer in layers.items() if name in layer.hra_u}


def _trained_tensors(wrappers: Mapping[str, Any], name: str) -> dict[tuple[str, str], Tensor]:
    """(path of the module, name of its tensor) -> the tensor in an adapter's copies of `modules_to_save`."""
    return {
        (f"{path}.{below}".rstrip("."), entry): getattr(owner, entry)
        for path, wrapper in wrappers.items()
        if name in wrapper.modules_to_save
        for below, owner in wrapper.modules_to_save[name].named_modules()
        for entry in (*owner._parameters, *owner._buffers)
        if getattr(owner, entry) is not None
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


def _remove_all(root: nn.Module) -> None:
    if record := get_state(root):
        remove_adapters(root, record, tuple(record.configs))


def _add(
    root: nn.Module,
    name: str,
    config: HRAConfig,
    vectors: Mapping[str, nn.Parameter],
    copies: Mapping[tuple[str, str], Tensor],
) -> None:
    """Add an adapter with the vectors of its layers, by path, and the tensors that it trains in modules."""
    config = without_unmatched(root, config)
    if odd := sorted(select(root, config).keys() ^ vectors.keys()):
        raise AdapterError(
            f"adapter {name!r}: {odd[0]} does not match the adapter's configuration, which was changed in PEFT."
        )

    def fill(path: str, layer: nn.Module, adapters: HouseholderAdapters) -> None:
        if len(vectors[path]) != adapters.width:  # of a kernel that is not square
            raise AdapterError(
                f"{path}: PEFT's vectors of {name!r} have length {len(vectors[path])}, but a row of the weight has "
                f"{adapters.width} entries. Adapt this layer with hra_fx.transform."
            )
        spec = AdapterSpec(vectors[path].shape[1], config.apply_GS, config.init_weights)
        adapters.put(name, spec, vectors[path].detach())
        adapters[name] = vectors[path]  # the same parameter, so that an optimizer keeps working

    put_adapter(root, name, config, fill, copies, root_class=root_class_for(root))


def _train_pairs(root: nn.Module, configs: Mapping[str, HRAConfig]) -> None:
    """Convert the vectors in the same parameters to pairs, where this is possible."""
    for path, layer in adapted_layers(root).items():
        for name in layer.hra_u.specs:
            if configs[name].trains_pairs(path):
                layer.hra_u.turn_into_pairs(name)
