"""The layers of a captured graph: adapted layers with vectors and weights, and layers without an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hra_fx.config import HRAConfig
from hra_fx.export.captured import get_metadata, rotations_of
from hra_fx.export.editors import ProgramEditor
from hra_fx.export.match import GraphLayer, find_layers, module_classes
from hra_fx.export.ops import remove_rotation
from hra_fx.export.select import build_skeleton, layer_of, make_layer
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.statistics import readable_rows
from hra_fx.layers.target import REFLECTION, LayerKind, describe

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer of a captured graph.

    Attributes:
        path: the qualified name of the layer.
        description: kind and shape of the layer.
        adapter: name of the adapter.
        r: number of trained vectors.
        chain: the adapter as plain reflections, `(d, k)`.
        rows: the weight as `(out, d)`; `None` if it cannot be read.
    """

    path: str
    description: str
    adapter: str
    r: int
    chain: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class UnadaptedLayers:
    """The layers of a captured graph that do not have reflections, but are of a supported kind.

    Attributes:
        skeleton: the model on which layers are selected.
        config: the configuration of the adapter; `None` if the graph does not have its metadata anymore.
        adapter: name of the adapter.
        layers: path -> (kind, description, why the weight cannot be rotated or `None`).
    """

    skeleton: nn.Module
    config: HRAConfig | None
    adapter: str
    layers: dict[str, tuple[LayerKind, str, str | None]]


def adapter_layers(program: ExportedProgram) -> list[LayerAdapter]:
    """The adapter of each layer of a program, in the order of the graph.

    Raises:
        AdapterError: the graph has no reflections.
    """
    editor = ProgramEditor(program)
    rotations, found = rotations_of(editor), []
    for rotation in rotations:
        remove_rotation(editor.graph, rotation.node)
    layers = find_layers(editor.weights, editor.parameters)
    for rotation in rotations:
        container, _, adapter = rotation.vectors_name.rpartition(".")
        path, vectors, weight = container.removesuffix(f".{REFLECTION}"), rotation.vectors, rotation.weight
        chain = plain_chain(vectors, rotation.anchor, apply_GS=rotation.apply_GS)
        rows = readable_rows(weight, vectors.shape[0], fan_in_fan_out=rotation.transposed)
        # A decomposition may have changed the weight of a linear layer to a form that is not recognized.
        description = _describe(layers[path], weight) if path in layers else describe(make_layer("linear", weight))
        found.append(LayerAdapter(path, description, adapter, vectors.shape[1], chain, rows))
    return found


def unadapted_layers(program: ExportedProgram) -> UnadaptedLayers:
    """The layers of a program without reflections, and the configuration of its adapter."""
    editor = ProgramEditor(program)
    metadata = get_metadata(editor.graph_module)
    config = None if metadata is None else HRAConfig.from_dict(metadata["config"])
    all_linear = config is not None and str(config.target_modules).lower() == "all-linear"
    parameters = editor.parameters
    layers = find_layers(editor.weights, parameters)
    found = {
        path: (layer.kind, _describe(layer, parameters[layer.name]), layer.refusal)
        for path, layer in layers.items()
        if layer.is_candidate
    }
    skeleton = build_skeleton(layers, parameters, module_classes(editor.graph), with_output=not all_linear)
    return UnadaptedLayers(skeleton, config, "" if metadata is None else metadata["adapter"], found)


def _describe(layer: GraphLayer, weight: Tensor) -> str:
    """Describe a layer as `hra_fx.layers.target.describe` describes the original layer."""
    return "Conv1D {}->{}".format(*weight.shape) if layer.transposed else describe(layer_of(layer, weight))
