"""Adapted Linear layers under tensor parallelism, which splits their weights over processes.

torch's `parallelize_module` splits parameters. transformers (`tp_plan`) also sets a `forward` on a layer, which calls
the method of the class that the layer had, so a hook reflects the input instead. Vectors stay plain parameters that are
the same in every process (`hra_fx.kernels.distributed`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hra_fx import compat
from hra_fx.errors import UnsupportedLayerError
from hra_fx.kernels.distributed import as_dtensor
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.layers.sharding import call, distribute_like, is_dtensor
from hra_fx.layers.target import REFLECTION, SAVED, describe
from hra_fx.layers.variants import has_own_forward

#: The attribute that stores the adapters and copies of a layer while `parallelize_module` splits its own parameters.
_ASIDE = "_hra_aside"
_MODULE = "transformers.distributed.tensor_parallel"
_HOOK = "_hra_input_hook"


def set_aside(layer: nn.Module) -> None:
    """Temporarily remove adapters and copies from a layer, so that `parallelize_module` sees a plain layer.

    torch's parallel styles split each parameter of a Linear and of its children, but cannot register a parameter of a
    child. Raises an `UnsupportedLayerError` if the adapters need the whole weight, and leaves the layer unchanged.
    """
    compat.require("parallelize_module of a model with adapters")
    if reason := why_not_split(layer):
        raise UnsupportedLayerError(f"{describe(layer)}: {reason}. Leave it out of the plan, or exclude it.")
    held = {name: layer._modules.pop(name) for name in (REFLECTION, SAVED) if name in layer._modules}
    vars(layer).setdefault(_ASIDE, {}).update(held)


def put_back(layer: nn.Module) -> None:
    """Undo `set_aside` in a layer after its parameters were distributed.

    All processes get the vectors of the first process, as torch does for the weight.
    """
    held: dict[str, nn.Module] = vars(layer).pop(_ASIDE, {})
    layer._modules.update(held)
    if REFLECTION in held:
        replicate(held[REFLECTION], layer._parameters["weight"])
    for holder in held[SAVED].children() if SAVED in held else ():
        for name, own in list(holder.named_parameters()):
            in_place: Any = layer._parameters[name]
            holder.register_parameter(name, nn.Parameter(distribute_like(own.detach(), in_place), own.requires_grad))


def is_half_split(layer: nn.Module) -> bool:
    """Whether the adapters of a layer are set aside."""
    return _ASIDE in layer.__dict__


def half_split(layer: nn.Module) -> UnsupportedLayerError:
    """The error for a layer whose adapters are still set aside, because `parallelize_module` failed."""
    return UnsupportedLayerError(
        f"{describe(layer)}: parallelize_module failed, and left it without its adapters. Build the model again."
    )


def is_tensor_parallel(layer: nn.Module, weight: Any) -> bool:
    """Whether a distributed weight was split by tensor parallelism only, without FSDP."""
    applied = "_distribute_module_applied" in vars(layer) or has_parallel_forward(layer)
    return applied and weight.device_mesh.ndim == 1


def why_not_split(layer: nn.Module) -> str | None:
    """Return why a layer with adapters cannot be split over processes, or `None`; without the final period."""
    if not isinstance(layer, nn.Linear) or has_own_forward(layer):
        return f"tensor parallelism supports only adapted nn.Linear layers, got {type(layer).__name__}"
    if scheme := quant_scheme_of(layer):
        return f"its weight is quantized ({scheme.description(layer)}), and cannot be split together with adapters"
    return None


def why_not_adapted(layer: nn.Module, weight: Any) -> str | None:
    """Return why a layer with a `DTensor` as its weight cannot be adapted, or `None`; without the final period."""
    if reason := why_not_split(layer):
        return reason
    if not is_tensor_parallel(layer, weight):
        return "its weight is a DTensor that was not split by parallelize_module or by transformers' tp_plan"
    return None


@torch.no_grad()
def replicate(adapters: nn.Module, weight: Any) -> None:
    """Send the vectors of the first process to all processes in the mesh of a distributed weight."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = weight.device_mesh
    for tensor in (*adapters.parameters(), *adapters.buffers()):
        tensor.data = distribute_tensor(tensor.data, mesh, [Replicate()] * mesh.ndim).to_local()


def has_parallel_forward(layer: nn.Module) -> bool:
    """Whether transformers set a column-wise or row-wise `forward` on a layer. Packed weights have other placements."""
    weight: Any = layer._parameters.get("weight")
    is_set = getattr(vars(layer).get("forward"), "__module__", None) == _MODULE
    return is_set and is_dtensor(weight) and all(type(each).__name__ == "Shard" for each in weight.placements)


def reflect_input(layer: nn.Module) -> None:
    """Reflect the input of a layer before the `forward` that transformers set on it, until `restore_input`."""
    restore_input(layer)
    vars(layer)[_HOOK] = layer.register_forward_pre_hook(_reflected)


def restore_input(layer: nn.Module) -> None:
    """Undo `reflect_input`, if it was called."""
    if (hook := vars(layer).pop(_HOOK, None)) is not None:
        hook.remove()


def _reflected(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = args
    adapters: Any = layer._modules[REFLECTION]
    if is_dtensor(x) or x.shape[-1] == adapters.width:
        return call(adapters, x), *rest
    from torch.distributed.tensor import Shard

    # Row-wise: this process has some columns of the input.
    mesh = adapters.weight_of(layer).device_mesh
    whole = as_dtensor(x, mesh, [Shard(x.dim() - 1)], (*x.shape[:-1], adapters.width))
    return call(adapters, whole).to_local(), *rest
