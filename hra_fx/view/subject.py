"""The input of a picture, whatever the model is: traced graphs, the modules around them, and the adapted layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from hra_fx.export.match import module_classes
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.model.state import AdapterState, adapted_layers, get_state
from hra_fx.view.describe import describe_module, own_parameters


@dataclass(frozen=True)
class LayerFacts:
    """What the box of an adapted layer shows.

    Attributes:
        detail: class and shape of the layer.
        width: length `d` of its vectors.
        rank: number of vectors in use, over all adapters; merged adapters are in use.
        parameters: number of parameters of the layer itself.
        vectors: number of parameters of all its adapters.
    """

    detail: str
    width: int
    rank: int
    parameters: int
    vectors: int


@dataclass(frozen=True)
class Subject:
    """A model to draw.

    Attributes:
        model: the modules by name; for a program, a skeleton of the modules that its names and calls show.
        graphs: module path -> traced graph.
        layers: path -> facts, once for each adapted layer.
        aliases: any path of an adapted layer -> its first one.
        classes: module path -> name of the class.
        parameters: number of parameters of the model, without its adapters.
    """

    model: nn.Module
    graphs: Mapping[str, fx.GraphModule]
    layers: Mapping[str, LayerFacts]
    aliases: Mapping[str, str]
    classes: Mapping[str, str]
    parameters: int


def subject_of(model: nn.Module, graphs: Mapping[str, fx.GraphModule]) -> Subject:
    """A model, adapted or not, with graphs that were traced from it.

    Args:
        model: the model.
        graphs: module path -> traced graph.
    """
    layers = adapted_layers(model)
    first = {layer: path for path, layer in layers.items()}
    named = dict(model.named_modules(remove_duplicate=False))
    record = get_state(model)
    return Subject(
        model=model,
        graphs=graphs,
        layers={path: _facts(layer, record) for path, layer in layers.items()},
        aliases={path: first[part] for path, part in named.items() if part in first},
        classes={path: type(part).__name__ for path, part in named.items()} | _classes_in(model),
        parameters=sum(parameter.numel() for parameter in own_parameters(model)),
    )


def _classes_in(model: nn.Module) -> dict[str, str]:
    """The classes of the modules whose forwards are in a `GraphModule`, which holds plain modules in their places."""
    if not isinstance(model, fx.GraphModule):
        return {}
    found = {path: kind.rpartition(".")[2] for path, kind in module_classes(model.graph).items()}
    plain = {path for path, part in model.named_modules() if type(part) is nn.Module}
    return {path: kind for path, kind in found.items() if path in plain}


def _facts(layer: AdaptedLayer, record: AdapterState | None) -> LayerFacts:
    reflection, used = layer.hra_u, layer.hra_u.active
    if record is not None and reflection.unmerged is not None:  # merged adapters act too
        held = {*reflection.active, *record.merged}
        used = tuple(name for name in record.active if name in held and name in reflection)
    rank = sum(reflection.specs[name].r for name in used)
    parameters = sum(parameter.numel() for parameter in own_parameters(layer))
    vectors = sum(parameter.numel() for parameter in reflection.parameters())
    return LayerFacts(describe_module(layer), reflection.width, rank, parameters, vectors)
