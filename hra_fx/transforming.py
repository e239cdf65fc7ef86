"""`transform`: select, capture, match, insert, verify; then the model carries its rewritten graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import fx, nn

from hra_fx.adapted import Record, drop_record, keep_record, record_of, sites_of
from hra_fx.capture.region import Region
from hra_fx.capture.search import Findings, find_regions
from hra_fx.carrier.layer import carrier_for
from hra_fx.carrier.region import RegionCarrier
from hra_fx.carrier.swap import swap, unswap
from hra_fx.config import HRAConfig
from hra_fx.eligibility import check, has_redundant_forward
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.reflection import AdapterSpec, Reflection, reflection_for
from hra_fx.selection import select
from hra_fx.site import REFLECTION, SiteKind, SiteLayer, kind_of
from hra_fx.trainable import Changes, freeze
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass

M = TypeVar("M", bound=nn.Module)


def transform(model: M, config: HRAConfig, adapter_name: str = "default", *, low_cpu_mem_usage: bool = False) -> M:
    """Insert reflections into a model, in place: each selected weight acts as `W Q` from now on.

    The model stays the object, and the class, that it was; its `state_dict` keeps every key and gains
    `<layer>.hra_u.<adapter>` of shape `(d, r)`, with `d = in_features` or `in_channels // groups * kh * kw` (and
    `<layer>.hra_u.<adapter>_anchor`, where `init_weights=True` takes one to start at the identity). Its own parameters
    are shared and frozen, as `config.bias` and `config.modules_to_save` leave them.

    Args:
        model: any module with Linear or Conv2d layers.
        config: which layers, how many reflections, and how they start.
        adapter_name: name of the adapter, a part of its parameters' names.
        low_cpu_mem_usage: make the vectors on the meta device, for `load_state_dict(..., assign=True)` to fill.

    Returns:
        `model`. The same call on a model that has the adapter already changes nothing.

    Raises:
        ConfigError: `config` is not an `HRAConfig`.
        SelectionError: the configuration does not fit the model.
        UnsupportedLayerError: a selected layer cannot be adapted rightly.
        AdapterError: the model has another adapter, or this one with another configuration.
        After any error the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = transform(model, HRAConfig(r=2, target_modules=["0", "2"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.hra_u.default', '2.hra_u.default']
    """
    config = _checked(model, config, adapter_name)
    if _is_done(model, config, adapter_name):
        return model
    selected = select(model, config)
    check(model, selected, config)
    sites: dict[str, SiteLayer] = {
        path: layer for path, layer in selected.items() if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    findings = find_regions(model, sites)
    spec = AdapterSpec(config.r, config.apply_GS, config.init_weights)
    # Vectors made in inference mode could never be trained.
    with torch.inference_mode(False), _all_or_nothing() as undo:
        for layer in sites.values():
            _attach(layer, adapter_name, spec, undo, on_meta=low_cpu_mem_usage)
        kinds = {path: kind_of(layer) for path, layer in sites.items()}
        for path, region in findings.regions.items():
            _install(model.get_submodule(path), path, region, kinds, undo)
        _keep(model, config, adapter_name, findings, undo)
    return model


def _checked(model: nn.Module, config: HRAConfig, adapter_name: str) -> HRAConfig:
    """A copy of the configuration, validated again, for its fields may have been set since it was made."""
    if not isinstance(model, nn.Module):
        raise AdapterError(f"model: {model!r} is no torch.nn.Module. Give the model itself, not its name or class.")
    if not isinstance(config, HRAConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise ConfigError(
            f"config: a {kind}, where an hra_fx.HRAConfig is due. Make one from its fields: hra_fx.HRAConfig(r=..., "
            "target_modules=...), or from the JSON of PEFT's with hra_fx.HRAConfig.from_pretrained(folder)."
        )
    if not isinstance(adapter_name, str):
        raise AdapterError(f"adapter_name: {adapter_name!r} is no string. Give a name such as 'default'.")
    return copy.deepcopy(dataclasses.replace(config))


def _is_done(model: nn.Module, config: HRAConfig, adapter_name: str) -> bool:
    record = record_of(model)
    carried = sites_of(model)
    if record and not carried:  # its parts were folded one by one
        Changes(record.requires_grad).restore(model)
        drop_record(model)
        record = None
    present = record.configs if record else {}
    if present.get(adapter_name) == config:
        if odd := sorted(select(model, config).keys() ^ carried.keys()):
            raise AdapterError(
                f"adapter {adapter_name!r}: the model was transformed and changed since, so that {odd[0]} is not in "
                "step with its configuration. Fold it (hra_fx.fold) and transform it again."
            )
        return True
    if adapter_name in present:
        raise AdapterError(
            f"adapter {adapter_name!r}: the model has it already, with another configuration. Fold it first, or choose "
            "another name."
        )
    if carried:
        names = ", ".join(dict.fromkeys(name for layer in carried.values() for name in layer.hra_u))
        raise AdapterError(
            f"adapter {adapter_name!r}: {next(iter(carried))} carries reflections already, of {names}. One adapter at "
            "a time: call hra_fx.fold first."
        )
    return False


@contextmanager
def _all_or_nothing() -> Iterator[ExitStack]:
    """A stack of steps back, which are taken if the block raises."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def _attach(layer: SiteLayer, name: str, spec: AdapterSpec, undo: ExitStack, *, on_meta: bool) -> None:
    reflection: Reflection = reflection_for(layer)
    reflection.add(name, spec, layer.weight, on_meta=on_meta)
    reflection.train(layer.training)
    undo.callback(layer._modules.pop, REFLECTION, None)
    layer.add_module(REFLECTION, reflection)
    if has_redundant_forward(layer):  # which would go before that of the swapped class
        undo.callback(setattr, layer, "forward", vars(layer).pop("forward"))
    swap(layer, carrier_for(layer))
    undo.callback(unswap, layer)


def _install(root: nn.Module, path: str, region: Region, kinds: dict[str, SiteKind], undo: ExitStack) -> None:
    rewritten: dict[int, fx.Graph] = {}
    for training, graph in region.graphs.items():
        if id(graph) not in rewritten:
            module = fx.GraphModule(root, graph)
            for step in (MatchPass(kinds, path), InsertPass(), VerifyPass()):
                step(module)
            rewritten[id(graph)] = module.graph
        region.graphs[training] = rewritten[id(graph)]
    region.settle(root)
    undo.callback(vars(root).pop, "_hra_region", None)
    root._hra_region = region  # type: ignore[assignment]
    swap(root, RegionCarrier)
    undo.callback(unswap, root)


def _keep(model: nn.Module, config: HRAConfig, name: str, findings: Findings, undo: ExitStack) -> None:
    changed = freeze(model, config)
    undo.callback(changed.restore, model)
    undo.callback(drop_record, model)
    keep_record(model, Record({name: config}, changed.flags, findings.alone))
