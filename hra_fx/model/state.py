"""Looking at a model that was transformed: its sites, regions and adapters, and what `transform` changed besides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.kernels.prefetch import forget
from hra_fx.layers.adapted_layer import SiteCarrier
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.class_swap import carriers_of, is_outermost
from hra_fx.layers.sharding import first_sharded
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import Copies

#: Attribute under which a transformed model keeps its record.
RECORD = "_hra_record"


@dataclass
class Record:
    """What `transform` keeps at the model, as a plain attribute that copies and pickles with it.

    Attributes:
        configs: adapter name -> configuration.
        active: the adapters in use, in the order of the product `W Q_a Q_b ...`, those that are merged among them.
        merged: those of the active ones whose product is in the weights.
        disabled: whether all adapters are switched off for the moment.
        requires_grad: parameter name -> (before, after), where `transform` changed it.
        untied: the model's configurations that said `tie_word_embeddings` before a trained copy untied them.
    """

    configs: dict[str, HRAConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    disabled: bool = False
    requires_grad: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    untied: tuple[Any, ...] = ()


def record_of(model: nn.Module) -> Record | None:
    """The record that `transform` left at this very module."""
    record = _notes(model).get(RECORD)
    return record if isinstance(record, Record) else None


def keep_record(model: nn.Module, record: Record) -> None:
    """Leave a record at a model."""
    vars(model)[RECORD] = _notes(model)[RECORD] = record


def drop_record(model: nn.Module) -> None:
    """Take the record away, where there is one."""
    forget(model)
    _notes(model).pop(RECORD, None)
    vars(model).pop(RECORD, None)


def _notes(model: nn.Module) -> dict[str, Any]:
    """What goes along with a copy: for a `GraphModule` its `meta`, for any other module its attributes.

    A `GraphModule` is copied with its `meta` and without other attributes, and pickled the other way round.
    """
    if not isinstance(model, fx.GraphModule):
        return vars(model)
    if RECORD in vars(model):
        model.meta.setdefault(RECORD, vars(model)[RECORD])
    return model.meta


class Inventory(NamedTuple):
    """What a model carries, found in one walk without paths: a switch of adapters takes little more than that.

    Attributes:
        roots: the modules that were transformed.
        reflections: those of every site.
        copies: (owner, copies) of every module that has some.
    """

    roots: list[nn.Module]
    reflections: list[Reflection]
    copies: list[tuple[nn.Module, Copies]]


def inventory(model: nn.Module) -> Inventory:
    """Walk through a model.

    Raises:
        AdapterError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model: {model!r} is no torch.nn.Module. Give a transformed model.")
    found = Inventory([], [], [])
    stack, seen = [model], {model}
    while stack:
        module = stack.pop()
        namespace = vars(module)
        if RECORD in namespace or (isinstance(module, fx.GraphModule) and RECORD in module.meta):
            found.roots.append(module)
        for child in namespace["_modules"].values():
            if child is None or child in seen:
                continue
            seen.add(child)
            if isinstance(child, Reflection):
                found.reflections.append(child)
            elif isinstance(child, Copies):
                found.copies.append((module, child))
            else:
                stack.append(child)
    return found


def root_of(model: nn.Module) -> tuple[nn.Module, Record]:
    """The transformed model in `model`, and its record: `model` itself, or what DDP, torch.compile or a class of the
    user's holds.

    Raises:
        AdapterError: there is none, or there are several.
    """
    return only_root(model, inventory(model))


def only_root(model: nn.Module, found: Inventory) -> tuple[nn.Module, Record]:
    """`root_of`, of what a walk through `model` has found."""
    kind = type(model).__name__
    if not found.roots and found.reflections:
        raise AdapterError(
            f"{kind}: it is a part of a transformed model, and adapters belong to the whole. Give the model that was "
            "transformed."
        )
    if not found.roots:
        raise AdapterError(f"{kind}: it has no reflections. Call hra_fx.transform(model, config) first.")
    if len(found.roots) > 1:
        paths = ", ".join(repr(path) for path, part in model.named_modules() if part in found.roots)
        raise AdapterError(f"{kind}: it holds several transformed models ({paths}). Give one of them.")
    record: Record = _notes(found.roots[0])[RECORD]
    return found.roots[0], record


def require_outermost(model: nn.Module) -> None:
    """Refuse a model of which a part wears another tool's class over ours, which would be lost with ours.

    Raises:
        AdapterError: naming the part.
    """
    if sharded := first_sharded(model):
        raise AdapterError(
            f"{sharded[0]}: {sharded[1]} shares its parameters out among processes, and goes on with those that it "
            "found. Take adapters off, and put others in, before it."
        )
    for path, module in model.named_modules():
        if carriers_of(module) and not is_outermost(module):
            raise AdapterError(
                f"{path or 'the model'}: another tool put a class of its own over it ({type(module).__name__}). Take "
                "that off first (parametrizations: torch.nn.utils.parametrize.remove_parametrizations)."
            )


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
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, SiteCarrier) and REFLECTION in module._modules
    }


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
