"""The layers of a captured graph: those with an adapter, with its vectors and weights, and those without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from hra_fx.compat import schema_of
from hra_fx.config import HRAConfig
from hra_fx.export.captured import Rotation, rotations_of
from hra_fx.export.editors import ProgramEditor
from hra_fx.export.match import WEIGHTS, find_layers, module_classes
from hra_fx.export.metadata import get_metadata
from hra_fx.export.skeleton import build_skeleton
from hra_fx.export.weight_uses import WeightUse, find_weight_uses
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotated_energy import readable_rows
from hra_fx.layers.target import REFLECTION, LayerKind

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
    """The layers of a captured graph that have no reflections, but are of a supported kind.

    Attributes:
        skeleton: the model on which layers are selected.
        config: the configuration of the adapter; `None` if the graph has lost its metadata.
        adapter: name of the adapter.
        layers: path -> (kind, description, why the weight cannot be rotated or `None`).
    """

    skeleton: nn.Module
    config: HRAConfig | None
    adapter: str
    layers: dict[str, tuple[LayerKind, str, str | None]]


def adapter_layers(program: ExportedProgram) -> list[LayerAdapter]:
    """The adapter of a program, layer by layer, in the order of the graph.

    Raises:
        AdapterError: the graph has no reflections.

    Example:
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> program = transform_captured(program, HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.description, layer.adapter) for layer in adapter_layers(program)]
        [('0', 'Linear 3->2', 'default')]
    """
    return [_layer_adapter(rotation) for rotation in rotations_of(ProgramEditor(program))]


def unadapted_layers(program: ExportedProgram) -> UnadaptedLayers:
    """The layers of a program without reflections, and the configuration of its adapter.

    Example:
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(1, 3),))
        >>> unadapted_layers(transform_captured(program, HRAConfig(r=2, target_modules=["0"]))).layers
        {'1': ('linear', 'Linear 4->2', None)}
    """
    editor = ProgramEditor(program)
    metadata = get_metadata(editor.graph_module)
    config = None if metadata is None else HRAConfig.from_dict(metadata["config"])
    all_linear = config is not None and str(config.target_modules).lower() == "all-linear"
    parameters = editor.parameters
    layers = find_layers(editor.weights, parameters)
    found = {
        path: (layer.kind, _describe(layer.kind, parameters[layer.name], list(layer.uses)), layer.refusal)
        for path, layer in layers.items()
        if layer.is_candidate
    }
    skeleton = build_skeleton(layers, parameters, module_classes(editor.graph), with_output=not all_linear)
    return UnadaptedLayers(skeleton, config, "" if metadata is None else metadata["adapter"], found)


def _layer_adapter(rotation: Rotation) -> LayerAdapter:
    weight, vectors = rotation.weight, rotation.vectors
    container, _, adapter = rotation.vectors_name.rpartition(".")
    uses = find_weight_uses(rotation.result, weight.dim())
    by_name = WEIGHTS[rotation.weight_name.rpartition(".")[2]]
    kinds: list[LayerKind] = [kind for kind in (by_name, *(use.kind for use in uses)) if kind]
    return LayerAdapter(
        path=container.removesuffix(f".{REFLECTION}"),
        description=_describe(kinds[0] if kinds else "linear", weight, uses),
        adapter=adapter,
        r=vectors.shape[1],
        chain=plain_chain(vectors, rotation.anchor, apply_GS=rotation.apply_GS),
        rows=readable_rows(weight, vectors.shape[0], columns=rotation.transposed),
    )


def _describe(kind: LayerKind, weight: Tensor, uses: list[WeightUse]) -> str:
    """The text that `hra_fx.layers.target.describe` returns for the original layer."""
    out, *rest = weight.shape
    if kind == "linear":
        transposed = any(use.transposed for use in uses if use.kind)
        return f"Conv1D {out}->{rest[0]}" if transposed else f"Linear {rest[0]}->{out}"
    if kind == "attention":
        return f"Attention {rest[0]}->3x{out // 3}"
    groups = next((_groups(use.consumer) for use in uses if use.kind), 1)
    size = "x".join(map(str, rest[1:]))
    return f"Conv{len(rest) - 1}d {rest[0] * groups}->{out} {size}" + f", groups {groups}" * (groups > 1)


def _groups(convolution: fx.Node) -> int:
    """The groups of a convolution, the last argument of all these operators."""
    operator: Any = convolution.target
    index = len(schema_of(operator).arguments) - 1
    groups = convolution.args[index] if len(convolution.args) > index else convolution.kwargs.get("groups", 1)
    return int(groups)  # type: ignore[arg-type]
