"""Select layers, and check that they can be adapted. Each error names the layer, the reason and a fix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hra_fx.compat import is_compiled_module, is_split_by_transformers
from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import has_class_forward, offloading_hook
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.quantized.libraries import is_packed, quant_scheme_of
from hra_fx.layers.sharding import SPLIT, is_dtensor, sharded_by
from hra_fx.layers.target import full_shape, held_weight, weight_entry, weight_place, width_of
from hra_fx.layers.trained_copies import get_copies
from hra_fx.selection.select import Modules, once, select, walk
from hra_fx.selection.tied import how_to_untie, tied_to

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXCLUDE = "exclude the layer with `exclude_modules`"
_EXCLUDE_IT = "E" + _EXCLUDE[1:]


def select_checked(model: nn.Module, config: HRAConfig, modules: Modules | None = None) -> dict[str, nn.Module]:
    """Select the layers of a model by a configuration, and check that all of them can be adapted.

    The error gives the reason for the first layer, and lists the others. `modules` is the result of `walk`, if the
    caller has it.

    >>> model = nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64))
    >>> select_checked(model, HRAConfig(target_modules=["0"]))
    Traceback (most recent call last):
    hra_fx.errors.UnsupportedLayerError: 0 (Linear): its weight must be a plain floating-point tensor, got torch.c...
    """
    modules = walk(model) if modules is None else modules
    layers = select(model, config, modules)
    _check_modules(modules, layers)
    problems = {path: _layer_problem(path, layer, config) for path, layer in layers.items()}
    problems |= _tied(modules, {path: layer for path, layer in layers.items() if not problems[path]})
    if unsupported := {path: problem for path, problem in problems.items() if problem}:
        first, *others = unsupported
        also = f" Also unsupported: {', '.join(others)}." if others else ""
        class_name = type(layers[first]).__name__
        raise UnsupportedLayerError(f"{first} ({class_name}): {unsupported[first]}.{also}")
    return layers


def _tied(modules: Modules, layers: Modules) -> dict[str, str]:
    """Path -> problem, for layers whose weight shares memory with another tensor, which has no adapter."""
    entries = {weight_entry(path, layer): path for path, layer in layers.items()}
    weights = {entry: held_weight(layers[path]) for entry, path in entries.items()}
    found = tied_to(once(modules), {entry: weight for entry, weight in weights.items() if weight is not None})
    return {
        entries[entry]: f"its weight is tied to {', '.join(others)}. {how_to_untie(entry)}. Or {_EXCLUDE}"
        for entry, others in found.items()
    }


def _check_modules(modules: Modules, layers: Iterable[str]) -> None:
    """Raise an error if any module of the model, or a parent of a selected layer, prevents adapters."""
    around = {"", *(path[:i] for path in layers for i, letter in enumerate(path) if letter == ".")}
    for path, module in modules.items():
        if problem := _module_problem(module, is_around=path in around):
            raise UnsupportedLayerError(f"{path or 'the model'}: {problem}.")


def _module_problem(module: nn.Module, *, is_around: bool) -> str | None:
    """Return why a model with this module cannot be adapted, or `None`; without the final period.

    `is_around` says whether the module is a parent of a selected layer.
    """
    if tool := sharded_by(module):
        return f"{tool} has already sharded it and ignores parameters that are added later. Adapt the model first"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel does not synchronize parameters that are added later. Adapt the model first"
    if is_around and (isinstance(module, nn.DataParallel) or is_compiled_module(module)):
        wrapper = "DataParallel" if isinstance(module, nn.DataParallel) else "torch.compile"
        return f"{wrapper} adds a prefix to the names of parameters. Adapt the model first, then wrap it"
    return None


def _layer_problem(path: str, layer: nn.Module, config: HRAConfig) -> str | None:
    """Return why this layer cannot be adapted, or `None`; without the final period."""
    if is_dtensor(held_weight(layer)) or is_split_by_transformers(layer):
        return SPLIT
    return _state_problem(layer) or _weight_problem(layer) or _rank_problem(path, layer, config)


def _state_problem(layer: nn.Module) -> str | None:
    owner, name = weight_place(layer)
    copies = get_copies(owner)
    if copies is not None and name in copies.names:
        return "another adapter trains it in full (`modules_to_save`). Fold or delete that adapter first"
    is_held = name in owner._parameters or (is_packed(layer) and name in owner._buffers)
    if parametrize.is_parametrized(owner, name) or not is_held:
        return (
            f"its `{name}` is computed from other parameters in each call, so it cannot be folded. Call "
            "torch.nn.utils.parametrize.remove_parametrizations (or torch.nn.utils.remove_weight_norm) first, or "
            f"{_EXCLUDE}"
        )
    if get_adapters(layer) is not None:
        return None  # It was checked when it got its first adapter.
    if not has_class_forward(layer):
        return f"its `forward` is set on the instance, which would bypass the adapter. Delete it, or {_EXCLUDE}"
    return None


def _weight_problem(layer: nn.Module) -> str | None:
    (owner, name), weight = weight_place(layer), held_weight(layer)
    if weight is None or is_lazy(weight):
        return f"it has no `{name}`, or it is not initialized. Run the model once first, or {_EXCLUDE}"
    if weight.is_meta and offloading_hook(owner) is not None and quant_scheme_of(layer):
        return f"accelerate offloads its quantized weight. Load the model without offloading this layer, or {_EXCLUDE}"
    if scheme := quant_scheme_of(layer):
        return scheme.why_not_adapted(layer)
    if type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
        found = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
        return f"its weight must be a plain floating-point tensor, got {found}. {_EXCLUDE_IT}"
    shape = tuple(full_shape(weight))
    expected = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else shape
    if shape != expected or 0 in shape:
        return f"its weight must not be packed or empty: expected shape {expected}, got {shape}. {_EXCLUDE_IT}"
    return None


def _rank_problem(path: str, layer: nn.Module, config: HRAConfig) -> str | None:
    width, rank = width_of(layer), config.rank_of(path)
    if not config.apply_GS or rank <= width:
        return None
    return (
        f"with `apply_GS=True`, `r` must be at most {width}, the input dimension of the layer, got {rank}. "
        f"Lower `r`, set `apply_GS=False`, or {_EXCLUDE}"
    )
