"""`transform`: select, capture, match, insert, verify; then the model carries its rewritten graphs."""

from __future__ import annotations

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
from hra_fx.trainable import freeze
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
    if not isinstance(config, HRAConfig):
        raise ConfigError(f"config: a {type(config).__name__}, where an hra_fx.HRAConfig is due.")
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


def _is_done(model: nn.Module, config: HRAConfig, adapter_name: str) -> bool:
    record = record_of(model)
    present = record.configs if record else {}
    if present.get(adapter_name) == config:
        return True
    if adapter_name in present:
        raise AdapterError(
            f"adapter {adapter_name!r}: the model has it already, with another configuration. Fold it first, or choose "
            "another name."
        )
    if carried := sites_of(model):
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
