"""Vectors that are not in memory between calls: load them, or explain why they cannot be read or written.

accelerate's offloading (`cpu_offload`, `disk_offload`, a device map) replaces them with tensors on the meta device.
Vectors are small: when something other than a forward needs them, they are loaded and stay loaded.
`FullyShardedDataParallel` (the older FSDP) and DeepSpeed's ZeRO-3 keep only flat shards, or no values at all.
"""

from __future__ import annotations

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.accelerate_hooks import WHOLE, keep_loaded, offloading_hook
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.state import adapted_layers


def load_vectors(model: nn.Module) -> None:
    """Load the vectors that accelerate offloads to the device of their layer. They are not offloaded again."""
    if reason := _flat_shard(model) or _offloaded_as_a_whole(model) or offloaded_copy(model):
        raise AdapterError(reason)
    for layer in adapted_layers(model).values():
        keep_loaded(layer.hra_u)


def offloaded_copy(model: nn.Module) -> str | None:
    """Return why trained copies cannot be read or switched now, and what to do; `None` if they can.

    accelerate's hook loads tensors by name, without regard to which copy is in use.
    """
    for path, (owner, copies) in all_copies(model).items():
        if any(offloading_hook(part) is not None for part in (owner, *copies.modules())):
            return (
                f"{path or 'the model'}: accelerate offloads it, with its trained copies (modules_to_save or bias). "
                "First load them with accelerate.hooks.remove_hook_from_submodules(model), and offload the model again "
                "afterwards."
            )
    return None


def _flat_shard(model: nn.Module) -> str | None:
    for path, layer in adapted_layers(model).items():
        if any(
            layer.hra_u[name].shape != layer.hra_u.vectors_shape(spec.r) for name, spec in layer.hra_u.specs.items()
        ):
            return (
                f"{path}: this process holds only a flat shard of its vectors (FullyShardedDataParallel, ZeRO-3). "
                "Gather them first (FullyShardedDataParallel.summon_full_params, deepspeed.zero.GatheredParameters), "
                "or shard with torch.distributed.fsdp.fully_shard."
            )
    return None


def _offloaded_as_a_whole(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        hook = offloading_hook(module)
        whole = hook is not None and hook.place_submodules
        if whole and any(isinstance(part, HouseholderAdapters) for part in module.modules()):
            return f"{path or 'the model'}: {WHOLE}."
    return None
