"""Taking things off a model again: single adapters, and all that made it an adapted one."""

from __future__ import annotations

from torch import nn

from hra_fx.carrier.region import REGION
from hra_fx.errors import UnsupportedLayerError
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.class_swap import carriers_of, original_class
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import copies_of, held_by
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.graph_module import restore
from hra_fx.model.inject import all_or_nothing, capture, install, take_off
from hra_fx.model.state import Record, drop_record, record_of, require_outermost, sites_of
from hra_fx.model.trainable import Changes, settle_ties
from hra_fx.tracing.search import Findings


def release(model: nn.Module) -> None:
    """Take everything off a model and off its parts. Tensors stay as they are, those in place of others too."""
    restore(model)
    parts = list(model.modules())
    for part in parts:
        if REFLECTION in part._modules and isinstance(part._modules[REFLECTION], Reflection):
            del part._modules[REFLECTION]
        if held_by(part) is not None:
            del part._modules[SAVED]
        vars(part).pop(REGION, None)
        if carriers_of(part):
            part.__class__ = original_class(part)
    for part in parts:
        if record := record_of(part):
            Changes(record.requires_grad).restore(part)
            drop_record(part)


def without(root: nn.Module, record: Record, names: tuple[str, ...]) -> Findings | None:
    """The regions that a model will have without some adapters, where they change; nothing is taken off yet.

    A capture that is refused now, for something was changed since, gives no regions: Python forwards are always right.

    Raises:
        AdapterError: another tool put a class of its own over a part.
    """
    require_outermost(root)
    sites = sites_of(root)
    rest = {path: layer for path, layer in sites.items() if not layer.hra_u.specs.keys() <= set(names)}
    copies = any(copies.copied.keys() <= set(names) for _, copies in copies_of(root).values())
    if set(record.configs) <= set(names) or (len(rest) == len(sites) and not copies):
        return None
    try:
        return capture(root, rest)
    except UnsupportedLayerError as error:
        return Findings(alone=dict.fromkeys(rest, str(error)))


def forget(root: nn.Module, record: Record, names: tuple[str, ...], findings: Findings | None) -> None:
    """Take adapters off; layers without another one are plain again, and with the last adapter the whole model is.

    `findings` is what `without` gave. Nothing here can fail.
    """
    with uninterrupted():
        for layer in sites_of(root).values():
            for name in names:
                layer.hra_u.remove(name)
        for owner, copies in copies_of(root).values():
            for name in names:
                copies.remove(owner, name)
            if not copies.copied:
                del owner._modules[SAVED]
        for name in names:
            del record.configs[name]
        record.active = tuple(name for name in record.active if name not in names)
        settle_ties(root, record)
        if not record.configs:
            release(root)
            return
        for layer in sites_of(root).values():
            if not layer.hra_u.specs:
                take_off(layer)
        if findings:
            with all_or_nothing() as undo:
                install(root, findings, undo)
            record.alone = findings.alone
