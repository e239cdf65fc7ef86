"""Update every adapted layer and every trained copy from the state of the model: which adapters are active."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.sharding import sharded_by
from hra_fx.layers.trained_copies import BASE
from hra_fx.model.offload import offloaded_copy
from hra_fx.model.state import AdaptedParts, AdapterState
from hra_fx.model.trainable import train_only


def activate(parts: AdaptedParts, state: AdapterState, names: tuple[str, ...], *, trainable: bool) -> None:
    """Activate and train exactly these adapters."""
    state.active = names
    sync_layers(parts, state)
    train_only(parts, names if trainable else ())


def sync_layers(parts: AdaptedParts, state: AdapterState) -> None:
    """Update every adapted layer and every trained copy from the state of the model."""
    state.layers = tuple(parts.layers)
    acting = () if state.disabled else state.active
    unmerged = tuple(name for name in acting if name not in state.merged)
    for reflection in parts.reflections:
        # nn.Module.__setattr__ would take longer than everything else that happens to a layer here.
        vars(reflection)["active"] = tuple([name for name in unmerged if name in reflection.specs])
    for owner, copies in parts.copies:
        copies.activate_copies(owner, next((name for name in acting if name in copies.copied), BASE))


def check_copies_can_switch(root: nn.Module, parts: AdaptedParts, acting: Iterable[str]) -> None:
    """Raise an error if trained copies must be switched in a sharded or offloaded model."""
    tool, names = next(filter(None, map(sharded_by, parts.modules)), None) if parts.copies else None, tuple(acting)
    reason = offloaded_copy(root) if parts.copies else None
    if tool is None and reason is None:
        return
    for owner, copies in parts.copies:
        if copies.would_change(next((name for name in names if name in copies.copied), BASE)):
            if reason is not None:
                raise AdapterError(reason)
            raise AdapterError(
                f"{_path_of(root, owner)}: its trained copies (modules_to_save or bias) cannot be switched, "
                f"because {tool} restores the parameters that it sharded. Set the adapters before sharding."
            )


def check_copies(root: nn.Module, parts: AdaptedParts, names: Iterable[str]) -> None:
    """Check that at most one of these adapters has a trained copy of each module."""
    wanted = tuple(names)
    for owner, copies in parts.copies:
        several = [name for name in wanted if name in copies.copied]
        if len(several) > 1:
            raise AdapterError(
                f"adapters {several} each have a trained copy of {_path_of(root, owner)} (modules_to_save or bias), "
                "and only one copy can be used at a time. Set one of these adapters."
            )


def _path_of(root: nn.Module, owner: nn.Module) -> str:
    return next(path for path, module in root.named_modules() if module is owner) or "the model"
