"""Adapted Linear layers under tensor parallelism, which splits their weights over processes.

torch's `parallelize_module` splits parameters. transformers (`tp_plan`) also sets a `forward` on a layer, which calls
the method of the class that the layer had; hra_fx makes it call the adapted class. Vectors stay plain parameters that
are the same in every process (`hra_fx.kernels.distributed`).
"""

from __future__ import annotations

from types import CellType
from typing import Any

import torch
from torch import nn

from hra_fx.errors import UnsupportedLayerError
from hra_fx.kernels.distributed import as_dtensor
from hra_fx.layers.quantized import quant_scheme_of
from hra_fx.layers.sharding import distribute_like, is_dtensor
from hra_fx.layers.target import REFLECTION, SAVED, describe
from hra_fx.layers.variants import has_own_forward

#: The attribute that stores the adapters and copies of a layer while `distribute_module` splits its own parameters.
_ASIDE = "_hra_aside"


def set_aside(layer: nn.Module) -> None:
    """Temporarily remove adapters and copies from a layer, so that `distribute_module` sees a plain layer.

    torch's parallel styles split each parameter of a Linear and of its children, but cannot register a parameter of a
    child. Raises an `UnsupportedLayerError` if the adapters need the whole weight, and leaves the layer unchanged.
    """
    if reason := why_not_distributed(layer):
        raise UnsupportedLayerError(f"{describe(layer)}: {reason}. Leave it out of the plan, or exclude it.")
    names = [name for name in (REFLECTION, SAVED) if name in layer._modules]
    vars(layer)[_ASIDE] = {name: layer._modules.pop(name) for name in names}


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
    return _ASIDE in vars(layer)


def half_split(layer: nn.Module) -> UnsupportedLayerError:
    """The error for a layer whose adapters are still set aside, because `distribute_module` failed."""
    return UnsupportedLayerError(
        f"{describe(layer)}: parallelize_module failed, and left it without its adapters. Build the model again."
    )


def is_tensor_parallel(layer: nn.Module, weight: Any) -> bool:
    """Whether a distributed weight was split by tensor parallelism only, without FSDP."""
    applied = "_distribute_module_applied" in vars(layer) or parallel_forward(layer) is not None
    return applied and weight.device_mesh.ndim == 1


def why_not_distributed(layer: nn.Module) -> str | None:
    """Return why a layer with adapters cannot be split over processes, or `None`; without the full stop."""
    if not isinstance(layer, nn.Linear) or has_own_forward(layer):
        return f"tensor parallelism supports only adapted nn.Linear layers, got {type(layer).__name__}"
    if scheme := quant_scheme_of(layer):
        return f"its weight is quantized ({scheme.description(layer)}), and cannot be split together with adapters"
    return None


def why_not_adapted(layer: nn.Module, weight: Any) -> str | None:
    """Return why a layer with a `DTensor` as its weight cannot be adapted, or `None`; without the full stop."""
    if reason := why_not_distributed(layer):
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


_MODULE = "transformers.distributed.tensor_parallel"
_STYLES = ("ColwiseParallel", "RowwiseParallel")


def parallel_forward(layer: nn.Module) -> dict[str, CellType] | None:
    """The variables of the column-wise or row-wise `forward` that transformers set on a layer, by name, or `None`."""
    forward: Any = vars(layer).get("forward")
    if getattr(forward, "__module__", None) != _MODULE or not getattr(forward, "__closure__", None):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
    known = {"original_forward", "mesh", "self"} <= cells.keys()
    return cells if known and type(cells["self"].cell_contents).__name__ in _STYLES else None


def call_adapted_class(layer: nn.Module) -> None:
    """Make the `forward` that transformers set on a layer call the layer's current class, if there is one."""
    cells = parallel_forward(layer)
    if cells is None:
        return
    from torch.distributed.tensor import Shard

    mesh = cells["mesh"].cell_contents

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        adapters: Any = layer._modules.get(REFLECTION)
        if adapters is None or is_dtensor(x) or x.shape[-1] == adapters.width:
            return type(layer).forward(layer, x, *args, **kwargs)
        whole = as_dtensor(x, mesh, [Shard(x.dim() - 1)], (*x.shape[:-1], adapters.width))
        return type(layer).forward(layer, x, adapters(whole).to_local())

    cells["original_forward"].cell_contents = forward
