"""Which adapters act: the record says so, and every site and every copy is brought in step with it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.sharding import first_sharded
from hra_fx.layers.trained_copies import BASE
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.state import Inventory, Record
from hra_fx.model.trainable import train_only


def activate(parts: Inventory, record: Record, names: tuple[str, ...], *, trainable: bool) -> None:
    """Make these the active adapters, and those that are trained."""
    with uninterrupted():
        record.active = names
        refresh(parts, record)
        train_only(parts, names if trainable else ())


def refresh(parts: Inventory, record: Record) -> None:
    """Bring every site and every copy in step with the record."""
    acting = () if record.disabled else record.active
    unmerged = tuple(name for name in acting if name not in record.merged)
    with uninterrupted():
        for reflection in parts.reflections:
            reflection.active = tuple(name for name in unmerged if name in reflection.specs)
        for owner, copies in parts.copies:
            copies.put_in_place(owner, next((name for name in acting if name in copies.copied), BASE))


def check_exchange(root: nn.Module, parts: Inventory, acting: Iterable[str]) -> None:
    """Refuse to exchange trained copies where a tool puts its own parameters back at every forward.

    Args:
        root: the model.
        parts: what it carries.
        acting: the adapters that are to act.

    Raises:
        AdapterError: there are copies to exchange, in a model that is sharded.
    """
    sharded, names = first_sharded(root) if parts.copies else None, tuple(acting)
    for owner, copies in parts.copies if sharded else ():
        if copies.would_change(next((name for name in names if name in copies.copied), BASE)):
            path = next(path for path, module in root.named_modules() if module is owner)
            raise AdapterError(
                f"{path or 'the model'}: its trained copies (modules_to_save or bias) would change places, and "
                f"{sharded[1] if sharded else ''} puts those back that it found. Choose the adapters before it."
            )


def check_copies(root: nn.Module, parts: Inventory, names: Iterable[str]) -> None:
    """Refuse adapters that want different copies in the same place.

    Raises:
        AdapterError: they do.
    """
    wanted = tuple(names)
    for owner, copies in parts.copies:
        several = [name for name in wanted if name in copies.copied]
        if len(several) > 1:
            path = next(path for path, module in root.named_modules() if module is owner)
            raise AdapterError(
                f"adapters {several}: each has its own trained copy of {path} (modules_to_save or bias), and only one "
                "can be in place. Set one of them at a time."
            )
