"""Looking at a model that was transformed: its sites, its regions, and what `transform` changed besides."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hra_fx.carrier.layer import Conv2dCarrier, LinearCarrier, SiteCarrier
from hra_fx.carrier.region import RegionCarrier
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError

_ATTRIBUTE = "_hra_record"


@dataclass
class Record:
    """What `transform` keeps at the model, as a plain attribute that copies and pickles with it.

    Attributes:
        configs: adapter name -> configuration.
        requires_grad: parameter name -> (before, after), where `transform` changed it.
        alone: path of a site in no region -> why.
    """

    configs: dict[str, HRAConfig] = field(default_factory=dict)
    requires_grad: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)


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


def sites_of(model: nn.Module) -> dict[str, SiteCarrier]:
    """Path -> layer, for every layer in `model` that carries reflections; each layer once."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, (LinearCarrier, Conv2dCarrier))
    }


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
