"""Detect parameters that are not in memory between calls, so that they cannot be read or written.

accelerate's offloading (`cpu_offload`, `disk_offload`, a device map) puts tensors on the meta device in their place.
`FullyShardedDataParallel`, the older FSDP, and DeepSpeed's ZeRO-3 leave flat shards, or nothing.
"""

from __future__ import annotations

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.model.state import adapted_layers


def offload_reason(model: nn.Module) -> str | None:
    """Why the weight or the vectors of some layer cannot be read now, and what to do; `None` if all can.

    Example:
        >>> offload_reason(nn.Linear(6, 4)) is None
        True
    """
    for path, layer in adapted_layers(model).items():
        if any(
            layer.hra_u[name].shape != layer.hra_u.vectors_shape(spec.r) for name, spec in layer.hra_u.specs.items()
        ):
            return (
                f"{path}: this process holds only a flat shard of its vectors (FullyShardedDataParallel, ZeRO-3). "
                "Gather them first (FullyShardedDataParallel.summon_full_params, deepspeed.zero.GatheredParameters), "
                "or shard with torch.distributed.fsdp.fully_shard."
            )
        for module in (layer, layer.hra_u):
            if "_hf_hook" in vars(module) and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
                return (
                    f"{path}: accelerate offloads its weight or its vectors between calls. Call "
                    "accelerate.hooks.remove_hook_from_submodules(model) first, which loads them, and dispatch the "
                    "model again afterwards."
                )
    return None


def require_materialized(model: nn.Module) -> None:
    """Refuse a model with parameters that are not in memory.

    Raises:
        AdapterError: naming the layer.
    """
    if reason := offload_reason(model):
        raise AdapterError(reason)
