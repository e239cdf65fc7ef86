"""Which selected layers can carry reflections: each refusal names the layer, the reason and the way out."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from hra_fx.config import HRAConfig
from hra_fx.errors import HRAWarning, UnsupportedLayerError
from hra_fx.layers.adapters import reflection_of
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.sharding import sharded_by
from hra_fx.layers.target import REFLECTION, kind_of, weight_name, width_of
from hra_fx.layers.trained_copies import held_by
from hra_fx.layers.variants import has_own_forward
from hra_fx.sources import can_be_written, names_below_self, reached_definitions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXCLUDE = "Leave it out with exclude_modules"


def check(model: nn.Module, sites: Mapping[str, nn.Module], config: HRAConfig) -> None:
    """Refuse a model or a site that cannot be adapted rightly.

    Args:
        model: the model.
        sites: path -> selected layer.
        config: the configuration of the adapter.

    Raises:
        UnsupportedLayerError: naming every such layer, and the reason of the first.

    Warns:
        HRAWarning: quantised layers beside the sites let no gradient pass.
    """
    refused: dict[str, str] = {}
    for path, module in model.named_modules():
        if reason := _why_not_model(module):
            raise UnsupportedLayerError(f"{path or 'the model'}: {reason}")
    for path, layer in sites.items():
        reason = _why_not_name(path) or _why_not_state(layer) or _why_not_weight(layer) or _why_not_forward(layer)
        reason = reason or _why_not_rank(layer, config)
        if reason:
            refused[path] = f"{path} ({type(layer).__name__}): {reason}."
    if refused:
        first, *others = refused
        also = f" Refused as well: {', '.join(others)}." if others else ""
        raise UnsupportedLayerError(refused[first] + also)
    if not config.inference_mode:
        _warn_of_stops(model, sites.values())


def _why_not_model(module: nn.Module) -> str | None:
    if "_hf_hook" in vars(module):
        return (
            "accelerate dispatches or offloads it by a hook that swaps weights around each call, under the feet of any "
            "rewrite. Load the model without device_map, or call accelerate.hooks.remove_hook_from_submodules(model) "
            "first."
        )
    if tool := sharded_by(module):
        return f"{tool} shares its parameters out among processes already, and would not know of vectors. Adapt first."
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return (
            "DistributedDataParallel lists what it averages when it wraps a model, and would not average new vectors. "
            "Adapt the model first, and wrap it then."
        )
    if type(module).__module__.startswith("peft.tuners") and hasattr(module, "base_layer"):
        return "a PEFT adapter is already inside. Call merge_and_unload() or unload() on it first."
    return None


def _warn_of_stops(model: nn.Module, sites: Iterable[nn.Module]) -> None:
    """Tell of quantised layers that no gradient passes, and that get no reflections, with which one would."""
    adapted = set(sites)
    stops = {
        path: reason
        for path, layer in model.named_modules()
        if layer not in adapted and reflection_of(layer) is None
        if (packing := packing_of(layer)) and (reason := packing.why_no_gradient(layer))
    }
    if stops:
        path, reason = next(iter(stops.items()))
        others = f" (and {len(stops) - 1} more)" if len(stops) > 1 else ""
        warnings.warn(
            f"{path}{others}: {reason}. What is trained before it learns only from what goes around it. Name such "
            "layers in target_modules too: with reflections, a gradient passes them.",
            HRAWarning,
            stacklevel=2,
        )


def _why_not_name(path: str) -> str | None:
    if can_be_written(path):
        return None
    return "the code of a graph cannot hold its name (a quotation mark, backslash or line break is in it). Rename it"


def has_redundant_forward(layer: nn.Module) -> bool:
    """Whether an instance's forward is the one of its class all the same: accelerate leaves that behind."""
    forward = vars(layer).get("forward")
    own = getattr(forward, "__self__", None) is layer
    return own and getattr(forward, "__func__", None) is type(layer).forward


def _why_not_state(layer: nn.Module) -> str | None:
    copies = held_by(layer)
    if copies is not None and weight_name(kind_of(layer)) in copies.in_place:
        return "another adapter saves it in full (modules_to_save). Fold or delete that one first"
    if reflection_of(layer) is not None:
        return None  # it was found fit when its first adapter came
    if "forward" in vars(layer) and not has_redundant_forward(layer):
        return f"its forward is set on the instance, which no rewrite can see through. Remove it, or l{_EXCLUDE[1:]}"
    if hasattr(layer, REFLECTION):
        return f"it has an attribute {REFLECTION!r} already. Rename that, or l{_EXCLUDE[1:]}"
    if type(layer).__call__ is not nn.Module.__call__:
        return f"its class has a __call__ of its own, which no rewrite can see through. {_EXCLUDE}"
    name = weight_name(kind_of(layer))
    if isinstance(layer, nn.MultiheadAttention) and {layer.kdim, layer.vdim} != {layer.embed_dim}:
        return (
            "its inputs differ in width (kdim, vdim), so that there is no one matrix of q, k and v to reflect. "
            f"{_EXCLUDE}, and name its out_proj"
        )
    if parametrize.is_parametrized(layer, name) or name not in layer._parameters:
        return (
            "its weight is computed from other parameters at every call, and cannot be folded into. Call "
            f"torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) first, or l{_EXCLUDE[1:]}"
        )
    return None


def _why_not_weight(layer: nn.Module) -> str | None:
    weight = layer._parameters[weight_name(kind_of(layer))]
    if weight is None or is_lazy(weight):
        return "its weight is not initialised yet. Run the model once first"
    if weight.is_meta:
        return "its weight is on the meta device, without data. Load the weights first"
    if packing := packing_of(layer):
        return packing.why_not_adapted(layer) or _why_not_quantized(layer, packing.words(layer))
    if type(weight.data) is not Tensor or weight.dtype not in _DTYPES:
        kind = type(weight.data).__name__ if type(weight.data) is not Tensor else str(weight.dtype)
        return f"its weight is a {kind}, which is not a plain floating-point tensor. {_EXCLUDE}"
    if not weight.numel():
        return f"its weight is empty, of shape {tuple(weight.shape)}. {_EXCLUDE}"
    if (due := _due_shape(layer)) and tuple(weight.shape) != due:
        shape = tuple(weight.shape)
        return f"its weight is of shape {shape}, where its sizes say {due}: packed, or laid out otherwise. {_EXCLUDE}"
    return None


def _why_not_quantized(layer: nn.Module, words: str) -> str | None:
    if not has_own_forward(layer):
        return None
    return (
        "its class has a forward of its own, so that its weight would have to be rotated, and that is quantised "
        f"({words}). {_EXCLUDE}"
    )


def _due_shape(layer: nn.Module) -> tuple[int, ...] | None:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return None


def _why_not_forward(layer: nn.Module) -> str | None:
    """Why a forward of a class's own cannot do with a weight that is made for it, as far as its source tells."""
    kind: Any = original_class(layer)
    definitions = [node for found in reached_definitions(kind).values() for node in found]
    if not has_own_forward(layer) or not definitions or isinstance(layer, nn.MultiheadAttention):
        return None
    inside = [node for definition in definitions for node in ast.walk(definition)]
    reads = [names for node in inside if (names := names_below_self(node)) and names[0] == "weight"]
    calls_base = any(isinstance(node, ast.Name) and node.id == "super" for node in inside)
    if not reads and not calls_base:
        return f"its class has a forward of its own, which does not read its weight. {_EXCLUDE}"
    if any(_writes(node) for node in inside):
        return (
            "the forward of its class writes into its weight, and the rotated weight is made for each read anew. "
            f"{_EXCLUDE}"
        )
    return None


def _writes(node: ast.AST) -> bool:
    """`self.weight = ...`, `self.weight.data = ...`, `self.weight.clamp_(...)`."""
    names = names_below_self(node)
    if names[:1] != ["weight"] or not isinstance(node, ast.Attribute):
        return False
    in_place = len(names) > 1 and names[-1].endswith("_") and not names[-1].endswith("__")
    return in_place or not isinstance(node.ctx, ast.Load)


def _why_not_rank(layer: nn.Module, config: HRAConfig) -> str | None:
    width = width_of(layer)
    if config.apply_GS and config.r > width:
        return (
            f"Gram-Schmidt makes r={config.r} vectors orthonormal, and its inputs have only {width} dimensions. "
            f"Lower r to {width} or less, set apply_GS=False, or l{_EXCLUDE[1:]}"
        )
    return None
