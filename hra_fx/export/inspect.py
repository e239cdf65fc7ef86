"""The layers of a captured graph: those with an adapter, with its vectors and weights, and those without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from hra_fx.compat import schema_of
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.export.insert import find_rotate_nodes
from hra_fx.export.match import WEIGHTS, find_layers, module_classes
from hra_fx.export.metadata import get_metadata
from hra_fx.export.program import is_program
from hra_fx.export.skeleton import build_skeleton
from hra_fx.export.weight_uses import WeightUse, find_weight_uses
from hra_fx.functional.rotated_energy import readable_rows
from hra_fx.layers.adapters import plain_chain
from hra_fx.layers.target import REFLECTION, SiteKind

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
    layers: dict[str, tuple[SiteKind, str, str | None]]


def adapter_layers(captured: ExportedProgram | fx.GraphModule) -> list[LayerAdapter]:
    """The adapter of a captured graph, layer by layer, in the order of the graph.

    Raises:
        AdapterError: the graph has no reflections.

    Example:
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> module = transform_captured(module, HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.description, layer.adapter) for layer in adapter_layers(module)]
        [('0', 'Linear 3->2', 'default')]
    """
    view = _view(captured)
    nodes = find_rotate_nodes(view.graph)
    if not nodes:
        raise AdapterError("the graph has no reflections. Transform it first: hra_fx.transform(program, config).")
    return [_layer_adapter(node, view) for node in nodes]


def unadapted_layers(captured: ExportedProgram | fx.GraphModule) -> UnadaptedLayers:
    """The layers of a captured graph without reflections, and the configuration of its adapter.

    Example:
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(1, 3),)).module()
        >>> unadapted_layers(transform_captured(module, HRAConfig(r=2, target_modules=["0"]))).layers
        {'1': ('linear', 'Linear 4->2', None)}
    """
    view = _view(captured)
    metadata = get_metadata(view.graph_module)
    config = None if metadata is None else HRAConfig.from_dict(metadata["config"])
    all_linear = config is not None and str(config.target_modules).lower() == "all-linear"
    parameters = {name: tensor for name, tensor in view.tensors.items() if isinstance(tensor, nn.Parameter)}
    layers = find_layers(view.weights, parameters)
    found = {
        path: (layer.kind, _describe(layer.kind, parameters[layer.name], list(layer.uses)), layer.refusal)
        for path, layer in layers.items()
        if layer.is_candidate
    }
    skeleton = build_skeleton(layers, parameters, module_classes(view.graph), with_output=not all_linear)
    return UnadaptedLayers(skeleton, config, "" if metadata is None else metadata["adapter"], found)


class _GraphView(NamedTuple):
    """The common interface of a program and a module: graph, tensors by name, and the name that a node reads."""

    graph_module: fx.GraphModule
    tensors: dict[str, Tensor]
    name_of: Callable[[fx.Node], str | None]

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def weights(self) -> dict[str, list[fx.Node]]:
        """The nodes that read each parameter."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            name = self.name_of(node)
            if name is not None and isinstance(self.tensors.get(name), nn.Parameter):
                found.setdefault(name, []).append(node)
        return found


def _view(captured: Any) -> _GraphView:
    if is_program(captured):
        targets = {spec.arg.name: spec.target for spec in captured.graph_signature.input_specs}
        names = {name: target for name, target in targets.items() if target in captured.state_dict}
        return _GraphView(captured.graph_module, dict(captured.state_dict), lambda node: names.get(node.name))
    tensors = dict(captured.named_parameters(remove_duplicate=False))
    tensors |= dict(captured.named_buffers(remove_duplicate=False))
    return _GraphView(captured, tensors, lambda node: str(node.target) if node.op == "get_attr" else None)


def _layer_adapter(node: fx.Node, view: _GraphView) -> LayerAdapter:
    names = [view.name_of(argument) if isinstance(argument, fx.Node) else None for argument in node.args[:3]]
    weight, vectors, anchor = (None if name is None else view.tensors[name].detach() for name in names)
    assert weight is not None and vectors is not None and names[1] is not None
    apply_GS, transposed = (bool(argument) for argument in node.args[3:])
    container, _, adapter = names[1].rpartition(".")
    uses = find_weight_uses(node, weight.dim())
    by_name = WEIGHTS[str(names[0]).rpartition(".")[2]]
    kinds: list[SiteKind] = [kind for kind in (by_name, *(use.kind for use in uses)) if kind]
    return LayerAdapter(
        path=container.removesuffix(f".{REFLECTION}"),
        description=_describe(kinds[0] if kinds else "linear", weight, uses),
        adapter=adapter,
        r=vectors.shape[1],
        chain=plain_chain(vectors, anchor, apply_GS=apply_GS),
        rows=readable_rows(weight, vectors.shape[0], columns=transposed),
    )


def _describe(kind: SiteKind, weight: Tensor, uses: list[WeightUse]) -> str:
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
