"""The layers of a captured graph, found by the names of their weights and by the operators that use them.

The path of a layer is the name of its weight without the last part. If a tensor has several names, each use belongs to
the layer whose forward contains it (`nn_module_stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from hra_fx.export.weight_uses import WeightUse, find_weight_uses, normalize_path
from hra_fx.layers.target import LayerKind

#: Names of parameters that can be rotated -> the kind of layer, if the name determines it.
WEIGHTS: dict[str, LayerKind | None] = {"weight": None, "in_proj_weight": "attention"}


@dataclass(frozen=True)
class GraphLayer:
    """A layer of a captured graph.

    Attributes:
        path: the qualified name of the layer.
        name: the qualified name of its weight.
        kind: the kind of layer.
        transposed: whether its weight is stored as `(d, out)`.
        uses: the uses of the weight by this layer.
        refusal: why its weight cannot be rotated, and what to do; `None` if it can.
        is_module: whether an operator inside of the layer's own forward uses the weight, so that the layer is a linear
            layer or a convolution; an embedding whose weight a linear operator uses elsewhere is not.
        aliases: other paths of the same layer.
        others: uses of the same tensor by other layers, each with the name of the tensor there.
    """

    path: str
    name: str
    kind: LayerKind
    transposed: bool
    uses: tuple[WeightUse, ...]
    refusal: str | None
    is_module: bool
    aliases: tuple[str, ...]
    others: tuple[tuple[WeightUse, str], ...]

    @property
    def source(self) -> str:
        """The name by which the graph reads the weight; its own name if other layers use the same tensor."""
        return self.name if self.others else self.uses[0].name

    @property
    def is_candidate(self) -> bool:
        """Whether it counts as a layer: see `is_module`, or its weight can be rotated wherever it is used."""
        return self.is_module or self.refusal is None


def find_layers(weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor]) -> dict[str, GraphLayer]:
    """All layers of a graph whose weight is used by a linear operator or a convolution, including unsupported ones.

    Args:
        weights: qualified name of a parameter -> its nodes in the graph.
        tensors: qualified name -> parameter; one tensor can have several names.

    Returns:
        layer path -> layer, in the order of `tensors`.
    """
    found: dict[str, GraphLayer] = {}
    for names in group_tied(tensors):
        rank = tensors[names[0]].dim()
        uses = [use for name in names for node in weights.get(name, ()) for use in find_weight_uses(node, rank, name)]
        if any(use.kind for use in uses):
            found |= {layer.path: layer for layer in _graph_layers(_group_by_layer(names, tensors, uses), uses)}
    order = {name: index for index, name in enumerate(tensors)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].name]))


def group_tied(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor. After loading, tied tensors are different objects on the same memory.

    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> group_tied({"a": weight, "b": torch.ones(2), "c": weight.detach()})
        [['a', 'c'], ['b']]
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_identity(tensor), []).append(name)
    return list(groups.values())


def _identity(tensor: Tensor) -> object:
    if tensor.is_meta or type(tensor.data) is not Tensor or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def module_classes(graph: fx.Graph) -> dict[str, str]:
    """The classes of the modules in the `nn_module_stack`s of a graph: path -> qualified name of the class."""
    classes: dict[str, str] = {}
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            text = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            classes.setdefault(normalize_path(path), text)
    return classes


def _group_by_layer(names: list[str], tensors: Mapping[str, Tensor], uses: list[WeightUse]) -> list[list[str]]:
    """The names of one tensor, grouped by layer: a layer that is called by several paths has several names.

    Names belong to the same layer if all tensors next to the weight are the same, and the same operators use it.
    """
    layers: dict[object, list[str]] = {}
    for name in names:
        path = name.rpartition(".")[0]
        targets = frozenset(use.consumer.target for use in uses if use.path == path)
        siblings = frozenset(
            (key.removeprefix(f"{path}."), _identity(tensor))
            for key, tensor in tensors.items()
            if len(names) > 1 and key.startswith(f"{path}.")
        )
        layers.setdefault((targets, siblings) if targets else name, []).append(name)
    return list(layers.values())


def _graph_layers(layers: list[list[str]], uses: list[WeightUse]) -> Iterable[GraphLayer]:
    paths = [[name.rpartition(".")[0] for name in names] for names in layers]
    owners = [(use, _owner(use, paths)) for use in uses]
    for index, (name, *_) in enumerate(layers):
        own = [use for use, owner in owners if owner == index]
        linear = [use for use in own if use.kind]
        last = name.rpartition(".")[2]
        if last not in WEIGHTS or not linear or not name.rpartition(".")[0]:
            continue
        kind = WEIGHTS[last] or linear[0].kind
        assert kind is not None  # `linear` has only uses with a kind
        yield GraphLayer(
            path=name.rpartition(".")[0],
            name=name,
            kind=kind,
            transposed=linear[0].transposed,
            uses=tuple(own),
            refusal=_refusal(own, [use for use, owner in owners if owner != index], owners),
            is_module=any(use.path in paths[index] for use in linear),
            aliases=tuple(paths[index][1:]),
            others=tuple((use, layers[owner][0]) for use, owner in owners if owner not in (index, None)),
        )


def _owner(use: WeightUse, paths: list[list[str]]) -> int | None:
    """The index of the layer that a use belongs to: its forward contains the use, or it is the only one below that."""
    if len(paths) == 1:
        return 0
    path = use.path
    exact = [index for index, layer in enumerate(paths) if path in layer]
    below = [index for index, layer in enumerate(paths) if path and any(own.startswith(f"{path}.") for own in layer)]
    found = exact or below
    return found[0] if len(found) == 1 else None


def _refusal(own: list[WeightUse], others: list[WeightUse], owners: list[tuple[WeightUse, int | None]]) -> str | None:
    unsupported = next((use for use in own if use.kind is None), None)
    if unsupported is not None:
        return (
            f"its weight is also used by {_describe(unsupported)}, which would see the rotated weight. Exclude the "
            "layer with exclude_modules, or untie the two weights before capturing the model"
        )
    shared = {use.first_user for use in own} & {use.first_user for use in others}
    ambiguous = next((use for use, owner in owners if owner is None or use.first_user in shared), None)
    if ambiguous is not None:
        return (
            f"its weight has several names, and the layer that its use by {_describe(ambiguous)} belongs to is not "
            "known. Untie the weights before capturing the model, or exclude the layer with exclude_modules"
        )
    if len({use.transposed for use in own}) > 1:
        plain, transposed = (next(use for use in own if use.transposed is side) for side in (False, True))
        return (
            f"its weight is used as `(out, d)` by {_describe(plain)}, and transposed by {_describe(transposed)}, so "
            "its input dimension is ambiguous. Exclude the layer with exclude_modules"
        )
    return None


def _describe(use: WeightUse) -> str:
    where = "" if use.path is None else f" in {use.path or 'the root module'}"
    return f"{use.consumer.target} (node {use.consumer.name!r}{where})"
