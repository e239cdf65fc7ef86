"""Whether this process has the tensors that an action needs: models that are sharded or offloaded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from hra_fx.compat import loaded_class
from hra_fx.errors import AdapterError, FoldError
from hra_fx.layers.accelerate_hooks import keep_loaded, offloading_hook
from hra_fx.layers.adapters import HouseholderAdapters, get_adapters
from hra_fx.layers.class_swap import is_swapped, mixins_of
from hra_fx.layers.sharding import is_dtensor, is_trained_by_zero, reshard, sharded_by
from hra_fx.layers.target import REFLECTION, full_shape, weight_place
from hra_fx.layers.trained_copies import get_copies
from hra_fx.passes.fold import check_reflections

#: What an action needs -> the states of a module that prevent it. FSDP2 gathers vectors and weights when they are read.
_PREVENTED_BY = {
    "vectors": {"flat", "empty", "offloaded"},
    "weights": {"flat", "empty", "offloaded", "FullyShardedDataParallel", "DeepSpeed"},
    "modules": {"offloaded", "class", "fully_shard", "FullyShardedDataParallel"},
    "adding": {"offloaded", "class", "fully_shard", "FullyShardedDataParallel", "trained"},
    "writing": {"flat", "offloaded", "class", "weight", "fully_shard", "FullyShardedDataParallel", "DeepSpeed"},
}
# What to do, without the final period.
_SHARDED = (
    "Add, remove, switch and fold adapters before sharding. Or save the adapter (hra_fx.save_adapter) and "
    "load it into an unsharded model, or fold it into the checkpoint (hra_fx.fold_checkpoint)"
)
_FLAT = (
    "Gather them first (FullyShardedDataParallel.summon_full_params, deepspeed.zero.GatheredParameters), or shard with "
    "torch.distributed.fsdp.fully_shard"
)
_DEEPSPEED = (
    "Add adapters before deepspeed.initialize or TrainingArguments, or save the adapter and load it into a new model"
)
_HOOKS = "Call accelerate.hooks.remove_hook_from_submodules(model) first, and offload the model again afterwards"


def refuse_program(model: object) -> None:
    """Raise an error for a `torch.export.ExportedProgram`, whose operators read parameters without calls of layers."""
    if isinstance(model, loaded_class("torch.export", "ExportedProgram")):
        raise AdapterError(
            "`model` is an ExportedProgram. Adapt the model before torch.export: hra_fx.transform(model, config)."
        )


def check_whole(model: nn.Module, action: str, needs: str = "vectors") -> None:
    """Check that this process has all tensors of a transformed model that an action needs.

    Vectors that accelerate offloads are loaded to the device of their layer, and are not offloaded again. Parameters
    that FSDP2 has not yet freed after a forward are freed.

    Args:
        model: the model.
        action: the name of the action, for the error.
        needs: "vectors" to read the adapters, "weights" to read also base weights, "modules" to remove modules or to
            switch trained copies, "adding" to add modules, "writing" to write base weights.

    Raises:
        AdapterError: the model is sharded or offloaded, or another tool has replaced a class.
        FoldError: the same, if `needs` is "writing".
        GraphInvariantError: the reflections of a graph cannot be removed, which all but "vectors" and "weights" needs.
    """
    if isinstance(model, fx.GraphModule) and needs not in ("vectors", "weights"):
        check_reflections(model)
    kind = FoldError if needs == "writing" else AdapterError
    modules = dict(model.named_modules())
    for path, module in modules.items():
        for state, problem, fix in _states(module):
            if state in _PREVENTED_BY[needs]:
                place = path.removesuffix(f".{REFLECTION}") or "the model"
                raise kind(f"{place}: {problem}, so hra_fx cannot {action}. {fix}.")
    for module in modules.values() if needs not in ("modules", "adding") else ():
        if isinstance(module, HouseholderAdapters):
            keep_loaded(module)
    reshard(modules.values())


def _states(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """What prevents actions: (state, problem, what to do)."""
    if tool := sharded_by(module):
        yield tool, f"{tool} has sharded its parameters", _SHARDED
    if mixins_of(module) and not is_swapped(module):
        yield "class", f"another tool replaced its class ({type(module).__name__})", "Undo that first"
    if isinstance(module, HouseholderAdapters):
        if any(module[name].shape != module.parameter_shape(name) for name in module.specs):
            yield "flat", "this process has only a flat part of its vectors (FSDP1 or ZeRO-3)", _FLAT
        if any(is_dtensor(vectors) and vectors.is_meta for vectors in module.parameters()):
            yield "empty", "its vectors are sharded and on the meta device", "Call model.to_empty(device=...) first"
        if any(map(is_trained_by_zero, module.parameters())):
            yield "trained", "DeepSpeed already trains its vectors", _DEEPSPEED
    adapters, copies = get_adapters(module), get_copies(module)
    if adapters is None and copies is None:
        return
    if any(full_shape(held) != held.shape for held in module.parameters(recurse=False)):
        yield "DeepSpeed", "DeepSpeed has split its weight (ZeRO-3)", _DEEPSPEED
    if copies is not None and any(offloading_hook(part) is not None for part in (module, *copies.modules())):
        yield "offloaded", "accelerate offloads its trained copies (modules_to_save or bias)", _HOOKS
    if adapters is not None and offloading_hook(weight_place(module)[0]) is not None:
        yield "weight", "accelerate offloads its weight", f"{_HOOKS}; or use hra_fx.fold_checkpoint"
