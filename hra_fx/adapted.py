"""Looking at a model that was transformed: its sites, regions and adapters, and what `transform` changed besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from hra_fx.carrier.layer import SiteCarrier
from hra_fx.carrier.region import RegionCarrier
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.reflection import Reflection

_ATTRIBUTE = "_hra_record"


@dataclass
class Record:
    """What `transform` keeps at the model, as a plain attribute that copies and pickles with it.

    Attributes:
        configs: adapter name -> configuration.
        active: the adapters in use, in the order of the product `W Q_a Q_b ...`, those that are merged among them.
        merged: those of the active ones whose product is in the weights.
        disabled: whether all adapters are switched off for the moment.
        requires_grad: parameter name -> (before, after), where `transform` changed it.
        alone: path of a site in no region -> why.
        untied: whether the model's configuration said `tie_word_embeddings` before a trained copy untied them.
    """

    configs: dict[str, HRAConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    disabled: bool = False
    requires_grad: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)
    untied: bool = False


def record_of(model: nn.Module) -> Record | None:
    """The record that `transform` left at this very module."""
    record = vars(model).get(_ATTRIBUTE)
    return record if isinstance(record, Record) else None


def keep_record(model: nn.Module, record: Record) -> None:
    """Leave a record at a model."""
    setattr(model, _ATTRIBUTE, record)


def drop_record(model: nn.Module) -> None:
    """Take the record away, where there is one."""
    vars(model).pop(_ATTRIBUTE, None)


def root_of(model: nn.Module) -> tuple[nn.Module, Record]:
    """The transformed model in `model`, and its record: `model` itself, or what DDP, torch.compile or a class of the
    user's holds.

    Raises:
        AdapterError: there is none, or there are several.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model: {model!r} is no torch.nn.Module. Give a transformed model.")
    found = [(path, part, record) for path, part in model.named_modules() if (record := record_of(part))]
    if not found and sites_of(model):
        raise AdapterError(
            f"{type(model).__name__}: it is a part of a transformed model, and adapters belong to the whole. Give the "
            "model that was transformed."
        )
    if not found:
        raise AdapterError(
            f"{type(model).__name__}: it has no reflections. Call hra_fx.transform(model, config) first."
        )
    if len(found) > 1:
        paths = ", ".join(repr(path) for path, _, _ in found)
        raise AdapterError(f"{type(model).__name__}: it holds several transformed models ({paths}). Give one of them.")
    return found[0][1], found[0][2]


def names_in(record: Record, names: str | Iterable[str]) -> tuple[str, ...]:
    """Adapter names as a tuple.

    Raises:
        AdapterError: the model has no such adapter, or one is named twice.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    for name in wanted:
        if name not in record.configs:
            present = ", ".join(map(repr, record.configs)) or "none"
            raise AdapterError(f"adapter {name!r}: the model has no such adapter. It has {present}.")
    if len(set(wanted)) < len(wanted):
        raise AdapterError(f"adapters {list(wanted)}: one is named twice. Name each once, in the order of the product.")
    return wanted


def sites_of(model: nn.Module) -> dict[str, SiteCarrier]:
    """Path -> layer, for every layer in `model` that carries reflections; each layer once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SiteCarrier)}


def reflections_of(model: nn.Module) -> list[Reflection]:
    """The reflections of every site in `model`."""
    return [module for module in model.modules() if isinstance(module, Reflection)]


def regions_of(model: nn.Module) -> dict[str, RegionCarrier]:
    """Path -> module, for every module in `model` that runs as a region."""
    return {path: module for path, module in model.named_modules() if isinstance(module, RegionCarrier)}


def require_sites(model: nn.Module) -> dict[str, SiteCarrier]:
    """`sites_of`, for callers that need some.

    Raises:
        AdapterError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model: {model!r} is no torch.nn.Module. Give a transformed model.")
    sites = sites_of(model)
    if not sites:
        raise AdapterError(
            f"{type(model).__name__}: it has no reflections. Call hra_fx.transform(model, config) first."
        )
    return sites
