"""Select layers, and check that they can be adapted. Each error names the layer, the reason and a fix."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hra_fx.compat import is_compiled_module, is_split_by_transformers
from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import has_class_forward, is_hooked, offloading_hook
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.experts_weight import ExpertsWeight
from hra_fx.layers.quantized import is_foreign_linear, quant_scheme_of
from hra_fx.layers.sharding import SPLIT, is_dtensor, sharded_by
from hra_fx.layers.target import full_shape, held_weight, weight_entry, weight_place, width_of
from hra_fx.layers.trained_copies import get_copies
from hra_fx.patterns import matches_rank
from hra_fx.selection.select import Modules, once, select, walk
from hra_fx.selection.suggestions import some_of
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
    _warn_about_unused_patterns(config, list(layers))
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
    if is_hooked(module) and isinstance(module, fx.GraphModule):
        return (
            "it is a GraphModule, and accelerate added its hook to the class, which the graph replaces. Call "
            "accelerate.hooks.remove_hook_from_submodules(model) first, and dispatch the model again afterwards"
        )
    if (hook := offloading_hook(module)) is not None and hook.place_submodules:
        return (
            "accelerate offloads it as a whole (preload_module_classes), with the tensors that it had when it was "
            "offloaded. Leave out preload_module_classes, or call "
            "accelerate.hooks.remove_hook_from_submodules(model) first"
        )
    if tool := sharded_by(module):
        return f"{tool} has already sharded it and ignores parameters that are added later. Adapt the model first"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return (
            "DistributedDataParallel does not synchronize parameters that are added later. Adapt the model first, then "
            "wrap it"
        )
    if is_around and (isinstance(module, nn.DataParallel) or is_compiled_module(module)):
        wrapper = "DataParallel" if isinstance(module, nn.DataParallel) else "torch.compile"
        return (
            f"{wrapper} adds a prefix to the names of parameters, so a saved adapter would not load elsewhere. Adapt "
            "the model first, then wrap it"
        )
    return None


def _layer_problem(path: str, layer: nn.Module, config: HRAConfig) -> str | None:
    """Return why this layer cannot be adapted, or `None`; without the final period."""
    if is_dtensor(held_weight(layer)) or is_split_by_transformers(layer):
        return SPLIT
    problem = _state_problem(layer) or _weight_problem(layer) or _rank_problem(path, layer, config)
    if problem and isinstance(layer, ExpertsWeight):
        problem += " (for experts, with longer names in `target_parameters`)"
    return problem


def _state_problem(layer: nn.Module) -> str | None:
    owner, name = weight_place(layer)
    copies = get_copies(owner)
    if copies is not None and name in copies.names:
        return "another adapter trains it in full (`modules_to_save`). Fold or delete that adapter first"
    is_held = name in owner._parameters or (is_foreign_linear(layer) and name in owner._buffers)
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
    if original_class(layer).__call__ is not nn.Module.__call__:
        return f"its class overrides `__call__`, which would bypass the adapter. {_EXCLUDE_IT}"
    if isinstance(layer, nn.MultiheadAttention) and {layer.kdim, layer.vdim} != {layer.embed_dim}:
        return (
            "its `kdim` or `vdim` differs from `embed_dim`, so query, key and value do not have a joint weight. "
            f"{_EXCLUDE_IT} and target its `out_proj`"
        )
    return None


def _weight_problem(layer: nn.Module) -> str | None:
    owner, weight = weight_place(layer)[0], held_weight(layer)
    if weight is None or is_lazy(weight):
        return "its weight is not initialized. Run the model once first"
    if weight.is_meta and offloading_hook(owner) is not None and quant_scheme_of(layer):
        return f"accelerate offloads its quantized weight. Load the model without offloading this layer, or {_EXCLUDE}"
    if scheme := quant_scheme_of(layer):
        return scheme.why_not_adapted(layer)
    if type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
        found = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
        return f"its weight must be a plain floating-point tensor, got {found}. {_EXCLUDE_IT}"
    shape = tuple(full_shape(weight))
    if not math.prod(shape):
        return f"its weight is empty, got shape {shape}. {_EXCLUDE_IT}"
    expected = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else shape
    if shape != expected:
        return f"its weight must have shape {expected}, got {shape} (packed?). {_EXCLUDE_IT}"
    return None


def _rank_problem(path: str, layer: nn.Module, config: HRAConfig) -> str | None:
    width, rank = width_of(layer), config.rank_of(path)
    if not config.apply_GS or rank <= width:
        return None
    return (
        f"with `apply_GS=True`, `r` must be at most {width}, the input dimension of the layer, got {rank}. "
        f"Lower `r`, set `apply_GS=False`, or {_EXCLUDE}"
    )


def _warn_about_unused_patterns(config: HRAConfig, paths: Sequence[str]) -> None:
    unused = [pattern for pattern in config.rank_pattern if not any(matches_rank(pattern, path) for path in paths)]
    if unused:
        names = ", ".join(map(repr, unused))
        text = f"rank_pattern: {names} matches none of the adapted layers, which are {some_of(paths, 3)}."
        warnings.warn(text, HRAWarning, stacklevel=3)
