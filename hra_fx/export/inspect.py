"""What a captured graph carries: its adapter's vectors and weights, layer by layer, and the layers that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, fx, nn

from hra_fx.compat import schema_of
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.export.insert import rotations
from hra_fx.export.match import WEIGHTS, GraphSite, find_sites, module_classes
from hra_fx.export.program import is_program
from hra_fx.export.select import note_of
from hra_fx.export.skeleton import outline_of
from hra_fx.export.weight_uses import Read, reads_of
from hra_fx.layers.adapters import plain_chain
from hra_fx.layers.target import REFLECTION, SiteKind
from hra_fx.model.rotated_share import readable_rows

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class Carried:
    """The adapter at one layer of a captured graph.

    Attributes:
        path: the layer's qualified name.
        site: kind and shape of the layer.
        adapter: name of the adapter.
        r: number of its trained vectors.
        chain: the adapter as plain reflections, `(d, k)`.
        rows: the weight as `(out, d)`; `None` if it cannot be read.
    """

    path: str
    site: str
    adapter: str
    r: int
    chain: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class Spare:
    """The layers of a captured graph that carry no reflections and are of a kind that could.

    Attributes:
        outline: the modules of the graph as the selection of layers sees them.
        config: the configuration of the adapter; `None` where the graph has lost it.
        adapter: name of the adapter.
        sites: path -> (kind, kind and shape in words, why its weight must not be rotated).
    """

    outline: nn.Module
    config: HRAConfig | None
    adapter: str
    sites: dict[str, tuple[SiteKind, str, str | None]]


def carried(captured: ExportedProgram | fx.GraphModule) -> list[Carried]:
    """The adapter of a captured graph, layer by layer, in the order of the graph.

    Raises:
        AdapterError: the graph has no reflections.

    Example:
        >>> import torch
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),)).module()
        >>> module = transform_captured(module, HRAConfig(r=2, target_modules=["0"]))
        >>> [(layer.path, layer.site, layer.adapter) for layer in carried(module)]
        [('0', 'Linear 3->2', 'default')]
    """
    held = _held(captured)
    nodes = rotations(held.graph)
    if not nodes:
        raise AdapterError("the graph has no reflections. Transform it first: hra_fx.transform(program, config).")
    return [_carried(node, held) for node in nodes]


def spare(captured: ExportedProgram | fx.GraphModule) -> Spare:
    """The layers of a captured graph that carry no reflections, and what its adapter asked for.

    Example:
        >>> import torch
        >>> import torch
        >>> from hra_fx.export.captured import transform_captured
        >>> module = torch.export.export(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(1, 3),)).module()
        >>> spare(transform_captured(module, HRAConfig(r=2, target_modules=["0"]))).sites
        {'1': ('linear', 'Linear 4->2', None)}
    """
    held = _held(captured)
    note = note_of(held.graph_module)
    config = None if note is None else HRAConfig.from_dict(note["config"])
    linear = config is not None and str(config.target_modules).lower() == "all-linear"
    parameters = {name: tensor for name, tensor in held.tensors.items() if isinstance(tensor, nn.Parameter)}
    sites = find_sites(held.weights, parameters)
    found = {
        path: (site.kind, _words(site.kind, parameters[site.name], list(site.reads)), site.refusal)
        for path, site in sites.items()
        if _is_layer(site)
    }
    outline = outline_of(sites, parameters, module_classes(held.graph), with_output=not linear)
    return Spare(outline, config, "" if note is None else note["adapter"], found)


class _Held(NamedTuple):
    """A program or a module, seen alike: its graph, its tensors by name, and whose tensor a node reads."""

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


def _held(captured: Any) -> _Held:
    if is_program(captured):
        names = {spec.arg.name: spec.target for spec in captured.graph_signature.input_specs}
        placed = {name: target for name, target in names.items() if target in captured.state_dict}
        return _Held(captured.graph_module, dict(captured.state_dict), lambda node: placed.get(node.name))
    tensors = dict(captured.named_parameters(remove_duplicate=False))
    tensors |= dict(captured.named_buffers(remove_duplicate=False))
    return _Held(captured, tensors, lambda node: str(node.target) if node.op == "get_attr" else None)


def _carried(node: fx.Node, held: _Held) -> Carried:
    named = [held.name_of(argument) if isinstance(argument, fx.Node) else None for argument in node.args[:3]]
    weight, vectors, anchor = (None if name is None else held.tensors[name].detach() for name in named)
    assert weight is not None and vectors is not None and named[1] is not None
    apply_GS, columns = (bool(argument) for argument in node.args[3:])
    container, _, adapter = named[1].rpartition(".")
    reads = reads_of(node, weight.dim())
    by_name = WEIGHTS[str(named[0]).rpartition(".")[2]]
    kinds: list[SiteKind] = [kind for kind in (by_name, *(read.kind for read in reads)) if kind]
    return Carried(
        path=container.removesuffix(f".{REFLECTION}"),
        site=_words(kinds[0] if kinds else "linear", weight, reads),
        adapter=adapter,
        r=vectors.shape[1],
        chain=plain_chain(vectors, anchor, apply_GS=apply_GS),
        rows=readable_rows(weight, vectors.shape[0], columns=columns),
    )


def _is_layer(site: GraphSite) -> bool:
    """Whether it is a layer by itself, and no embedding, say, whose weight a linear operator reads too."""
    return site.own or site.refusal is None


def _words(kind: SiteKind, weight: Tensor, reads: list[Read]) -> str:
    """What `hra_fx.layers.target.describe` says of the layer that was captured."""
    out, *rest = weight.shape
    if kind == "linear":
        columns = any(read.columns for read in reads if read.kind)
        return f"Conv1D {out}->{rest[0]}" if columns else f"Linear {rest[0]}->{out}"
    if kind == "attention":
        return f"Attention {rest[0]}->3x{out // 3}"
    groups = next((_groups(read.reader) for read in reads if read.kind), 1)
    size = "x".join(map(str, rest[1:]))
    return f"Conv{len(rest) - 1}d {rest[0] * groups}->{out} {size}" + f", groups {groups}" * (groups > 1)


def _groups(convolution: fx.Node) -> int:
    """The groups of a convolution, the last argument of each operator that is one."""
    operator: Any = convolution.target
    place = len(schema_of(operator).arguments) - 1
    given = convolution.args[place] if len(convolution.args) > place else convolution.kwargs.get("groups", 1)
    return int(given)  # type: ignore[arg-type]
