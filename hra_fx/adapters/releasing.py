"""Taking things off a model again: single adapters, and all that made it an adapted one."""

from __future__ import annotations

from torch import nn

from hra_fx.adapted import Record, drop_record, record_of, sites_of
from hra_fx.adapters.copies import Copies, copies_of
from hra_fx.adapters.trainable import Changes, settle_ties
from hra_fx.carrier.swap import carriers_of, original_class
from hra_fx.installing import all_or_nothing, capture, install, take_off
from hra_fx.reflection import Reflection
from hra_fx.site import REFLECTION, SAVED


def release(model: nn.Module) -> None:
    """Take everything off a model and off its parts. Tensors stay as they are, those in place of others too."""
    parts = list(model.modules())
    for part in parts:
        for child in (REFLECTION, SAVED):
            if isinstance(part._modules.get(child), (Reflection, Copies)):
                del part._modules[child]
        vars(part).pop("_hra_region", None)
        if carriers_of(part):
            part.__class__ = original_class(part)
    for part in parts:
        if record := record_of(part):
            Changes(record.requires_grad).restore(part)
            drop_record(part)


def forget(root: nn.Module, record: Record, names: tuple[str, ...]) -> None:
    """Take adapters out of the record, the sites and the copies; layers without an adapter are plain ones again."""
    for layer in sites_of(root).values():
        for name in names:
            layer.hra_u.remove(name)
    for owner, copies in copies_of(root).values():
        for name in names:
            copies.remove(owner, name)
    done = [owner for owner, copies in copies_of(root).values() if not copies.copied]
    for owner in done:
        del owner._modules[SAVED]
    for name in names:
        del record.configs[name]
    record.active = tuple(name for name in record.active if name not in names)
    settle_ties(root, record)
    empty = [layer for layer in sites_of(root).values() if not layer.hra_u.specs]
    if not record.configs:
        release(root)
    elif empty or done:
        for layer in empty:
            take_off(layer)
        findings = capture(root, sites_of(root))
        with all_or_nothing() as undo:
            install(root, findings, undo)
        record.alone = findings.alone
