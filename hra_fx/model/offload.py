"""Tensors that are elsewhere between the calls of a module, so that nothing can be read from them or written to them.

Where accelerate offloads a module (`cpu_offload`, `disk_offload`, a device map), tensors on the meta device stand in
their place. `FullyShardedDataParallel`, the older FSDP, and DeepSpeed's ZeRO-3 leave flat pieces, or nothing.
"""

from __future__ import annotations

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.model.state import sites_of


def why_absent(model: nn.Module) -> str | None:
    """Why the weight or the vectors of a layer cannot be read or written now, with the way out; `None` where they can.

    Example:
        >>> why_absent(nn.Linear(6, 4)) is None
        True
    """
    for path, layer in sites_of(model).items():
        if any(layer.hra_u[name].shape != (layer.hra_u.width, spec.r) for name, spec in layer.hra_u.specs.items()):
            return (
                f"{path}: this process holds only a flat shard of its vectors (FullyShardedDataParallel, ZeRO-3). "
                "Gather them first (FullyShardedDataParallel.summon_full_params, deepspeed.zero.GatheredParameters), "
                "or shard with torch.distributed.fsdp.fully_shard."
            )
        for module in (layer, layer.hra_u):
            if "_hf_hook" in vars(module) and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
                return (
                    f"{path}: accelerate keeps its weight or vectors elsewhere between calls (offload, device_map). "
                    "Call accelerate.hooks.remove_hook_from_submodules(model) first, which brings them back, and "
                    "dispatch the model again afterwards."
                )
    return None


def require_present(model: nn.Module) -> None:
    """Refuse a model of which some layer is elsewhere.

    Raises:
        AdapterError: naming the layer.
    """
    if reason := why_absent(model):
        raise AdapterError(reason)
