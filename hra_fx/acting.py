"""Which adapters act: the record says so, and every site and every copy is brought in step with it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hra_fx.adapted import Record, reflections_of
from hra_fx.copies import BASE, copies_of
from hra_fx.errors import AdapterError
from hra_fx.trainable import train_only


def activate(root: nn.Module, record: Record, names: tuple[str, ...], *, trainable: bool) -> None:
    """Make these the active adapters, and those that are trained."""
    record.active = names
    refresh(root, record)
    train_only(root, names if trainable else ())


def refresh(root: nn.Module, record: Record) -> None:
    """Bring every site and every copy in step with the record."""
    acting = () if record.disabled else record.active
    unmerged = tuple(name for name in acting if name not in record.merged)
    for reflection in reflections_of(root):
        reflection.active = tuple(name for name in unmerged if name in reflection.specs)
    for owner, copies in copies_of(root).values():
        copies.put_in_place(owner, next((name for name in acting if name in copies.copied), BASE))


def check_copies(root: nn.Module, names: Iterable[str]) -> None:
    """Refuse adapters that want different copies in the same place.

    Raises:
        AdapterError: they do.
    """
    wanted = tuple(names)
    for path, (_, copies) in copies_of(root).items():
        several = [name for name in wanted if name in copies.copied]
        if len(several) > 1:
            raise AdapterError(
                f"adapters {several}: each has its own trained copy of {path} (modules_to_save or bias), and only one "
                "can be in place. Set one of them at a time."
            )
