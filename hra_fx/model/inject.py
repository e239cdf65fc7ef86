"""Putting reflections and regions into a model: select, capture, match, insert, verify; each step can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from hra_fx.carrier.region import REGION, RegionCarrier
from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.inert import weight_readers
from hra_fx.layers.adapted_layer import carrier_for
from hra_fx.layers.adapters import AdapterSpec, Reflection
from hra_fx.layers.class_swap import swap, unswap
from hra_fx.layers.quantized.detect import packing_of
from hra_fx.layers.target import REFLECTION, Site
from hra_fx.layers.variants import must_be_on_weight, reflection_for
from hra_fx.model.base_view import laid_bare
from hra_fx.model.example_inputs import Call
from hra_fx.model.graph_module import rewrite
from hra_fx.model.state import regions_of, require_outermost, sites_of
from hra_fx.selection.check import check, has_redundant_forward
from hra_fx.selection.select import select
from hra_fx.tracing.observing import NOTHING, Observed, observe
from hra_fx.tracing.region import Region
from hra_fx.tracing.search import Findings, find_regions
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass

#: Adds an adapter to the reflections of a site: (path, layer, reflections).
Fill: TypeAlias = Callable[[str, nn.Module, Reflection], None]


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """A stack of steps back, which are taken if the block raises.

    Inference mode is off inside, for vectors made in it could never be trained.
    """
    with torch.inference_mode(False), ExitStack() as undo:
        yield undo
        undo.pop_all()


def introduce(
    model: nn.Module, name: str, config: HRAConfig, fill: Fill, undo: ExitStack, call: Call | None = None
) -> tuple[dict[str, nn.Module], Findings | None]:
    """Give adapter `name` to every layer that `config` selects; it is not active yet.

    `call`, an example, may be given for a plain model.

    Returns:
        The layers by path, and what capture found, where new sites or copies to come make a new capture necessary.

    Raises:
        SelectionError: the configuration does not fit the model.
        UnsupportedLayerError: a selected layer cannot be adapted rightly.
    """
    layers = select(model, config)
    check(model, layers, config)
    present = sites_of(model)
    new = {path: layer for path, layer in layers.items() if path not in present}
    copies = config.modules_to_save or config.bias != "none"
    if new or copies:
        require_outermost(model)
    seen = observe(model, call, new) if call else NOTHING
    findings = capture(model, {**present, **new}, seen) if new or copies else None
    readers = seen.read | weight_readers(model, new) | (findings.read if findings else {})
    for path in readers.keys() & present.keys():
        if not present[path].hra_u.on_weight:
            raise UnsupportedLayerError(
                f"{path}: {readers[path]} reads its weight by now, and its reflections act on its input. Fold the "
                "adapters that the model has, and transform it anew."
            )
    for path, layer in layers.items():
        if path in new:
            _attach(path, layer, undo, on_weight=path in readers or must_be_on_weight(layer))
        reflection: Any = layer._modules[REFLECTION]
        undo.callback(reflection.remove, name)
        fill(path, layer, reflection)
    if findings:
        install(model, findings, undo)
    return layers, findings


def drawn(name: str, config: HRAConfig, *, on_meta: bool) -> Fill:
    """Fresh vectors, as the configuration starts them."""
    spec = AdapterSpec(config.r, config.apply_GS, config.init_weights)
    return lambda path, layer, reflection: reflection.add(name, spec, reflection.weight_of(layer), on_meta=on_meta)


def capture(model: nn.Module, sites: Mapping[str, nn.Module], seen: Observed = NOTHING) -> Findings:
    """The regions of a model for these sites, whatever it carries already."""
    with laid_bare(model):
        return find_regions(model, sites, seen)


def install(model: nn.Module, findings: Findings, undo: ExitStack) -> None:
    """Put regions in place of those that a model has."""
    for module in regions_of(model).values():
        undo.callback(_put_back, module, type(module), vars(module)[REGION])
        unswap(module, RegionCarrier)
        del vars(module)[REGION]
    names = {layer: Site(path, layer.hra_u.kind, layer.hra_u.on_weight) for path, layer in sites_of(model).items()}
    # By every path, for the graph of a region calls a shared layer by one of its own.
    sites = {path: names[part] for path, part in model.named_modules(remove_duplicate=False) if part in names}
    if isinstance(model, fx.GraphModule):
        rewrite(model, sites, undo)
    for path, region in findings.regions.items():
        _install(model.get_submodule(path), path, region, sites, undo)


def settle(model: nn.Module) -> None:
    """Take down anew what regions rest on, after children have come; only right after `install`."""
    for module in regions_of(model).values():
        region: Region = module._hra_region
        region.settle(module)


def take_off(layer: nn.Module) -> None:
    """Make a site's layer a plain one again."""
    unswap(layer, carrier_for(layer))
    del layer._modules[REFLECTION]


def _attach(path: str, layer: nn.Module, undo: ExitStack, *, on_weight: bool) -> None:
    if on_weight and (packing := packing_of(layer)):
        raise UnsupportedLayerError(
            f"{path}: its weight is read by another module, and would have to be rotated, but it is quantised "
            f"({packing.words(layer)}). Leave it out with exclude_modules."
        )
    reflection = reflection_for(layer, on_weight=on_weight)
    reflection.train(layer.training)
    undo.callback(layer._modules.pop, REFLECTION, None)
    layer.add_module(REFLECTION, reflection)
    if has_redundant_forward(layer):  # which would go before that of the swapped class
        undo.callback(setattr, layer, "forward", vars(layer).pop("forward"))
    carrier = carrier_for(layer)
    try:
        swap(layer, carrier)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{path}: {error}") from error
    undo.callback(unswap, layer, carrier)


def _install(root: nn.Module, path: str, region: Region, sites: dict[str, Site], undo: ExitStack) -> None:
    for graph in region.drafts():
        draft: Any = _Draft(root, graph)
        MatchPass(sites, path)(draft)
        InsertPass().call(draft)  # what it ensures, the next one asks too
        VerifyPass()(draft)
        graph.owning_module = None  # else each copy and pickle of the region would hold it
    region.settle(root)
    undo.callback(vars(root).pop, REGION, None)
    root._hra_region = region  # type: ignore[assignment]
    swap(root, RegionCarrier)
    undo.callback(unswap, root, RegionCarrier)


class _Draft:
    """A graph on its way through passes: what they use of a GraphModule, without the code, which nobody calls yet."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        # For lint() to look up the targets in.
        graph.owning_module = root  # type: ignore[assignment]

    def recompile(self) -> None:
        """Nothing: `Region.program` compiles what is called."""


def _put_back(module: nn.Module, kind: type[nn.Module], region: Region) -> None:
    module.__class__ = kind
    module._hra_region = region  # type: ignore[assignment]
