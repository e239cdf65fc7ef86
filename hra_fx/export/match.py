"""Which layers of a captured graph can carry reflections: sites, by the names of weights and by how they are read.

A layer is called as its weight without the last part of the name. Where several names stand for one tensor, each read
belongs to the layer in whose forward it stands (`nn_module_stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from hra_fx.export.weight_uses import Read, module_path, plain_path, reads_of
from hra_fx.layers.target import SiteKind

#: Names of the parameters that may be rotated -> the kind of site, where the name tells.
WEIGHTS: dict[str, SiteKind | None] = {"weight": None, "in_proj_weight": "attention"}


@dataclass(frozen=True)
class GraphSite:
    """A layer of a captured graph, by its weight.

    Attributes:
        path: the layer's qualified name.
        name: its weight's.
        kind: the kind of site.
        columns: whether its weight is `(d, out)`.
        reads: the reads that are this layer's.
        refusal: why its weight must not be rotated, and the way out; `None` where it may.
        own: whether the layer itself is a linear layer or a convolution, and not only a holder of the weight of one.
        aliases: other paths of the same layer.
        others: reads of the same tensor that belong to other layers, each with the name that it has there.
    """

    path: str
    name: str
    kind: SiteKind
    columns: bool
    reads: tuple[Read, ...]
    refusal: str | None
    own: bool
    aliases: tuple[str, ...]
    others: tuple[tuple[Read, str], ...]

    @property
    def source(self) -> str:
        """The name under which the graph reads the weight; its own, once other layers read the same tensor."""
        return self.name if self.others else self.reads[0].name


def find_sites(weights: Mapping[str, list[fx.Node]], tensors: Mapping[str, Tensor]) -> dict[str, GraphSite]:
    """All layers of a graph whose weight a linear operator or a convolution reads, fit for reflections or not.

    Args:
        weights: qualified name of a parameter -> its nodes in the graph.
        tensors: qualified name -> parameter; one tensor may have several names.

    Returns:
        layer path -> site, in the order of `tensors`.
    """
    found: dict[str, GraphSite] = {}
    for names in groups_of(tensors):
        rank = tensors[names[0]].dim()
        reads = [read for name in names for node in weights.get(name, ()) for read in reads_of(node, rank, name)]
        if any(read.kind for read in reads):
            found |= {site.path: site for site in _sites_of(_layers(names, tensors, reads), reads)}
    order = {name: place for place, name in enumerate(tensors)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].name]))


def groups_of(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor, for one may have several: after loading by the same memory only.

    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> groups_of({"a": weight, "b": torch.ones(2), "c": weight.detach()})
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
    """The classes of the modules that a graph passes through: path -> qualified name of the class."""
    classes: dict[str, str] = {}
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            text = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            classes.setdefault(plain_path(path), text)
    return classes


def owner_of(name: str) -> str:
    """The path of the module that holds a parameter.

    Example:
        >>> owner_of("blocks.0.proj.weight")
        'blocks.0.proj'
    """
    return name.rpartition(".")[0]


def _layers(names: list[str], tensors: Mapping[str, Tensor], reads: list[Read]) -> list[list[str]]:
    """The names of one tensor, by layers: those of one layer that is called on several paths come together.

    Such names have all tensors beside the weight in common too, and are read by the same operators.
    """
    layers: dict[object, list[str]] = {}
    for name in names:
        path = owner_of(name)
        readers = frozenset(read.reader.target for read in reads if read.path == path)
        held = frozenset(
            (key.removeprefix(f"{path}."), _identity(tensor))
            for key, tensor in tensors.items()
            if len(names) > 1 and key.startswith(f"{path}.")
        )
        layers.setdefault((readers, held) if readers else name, []).append(name)
    return list(layers.values())


def _sites_of(layers: list[list[str]], reads: list[Read]) -> Iterable[GraphSite]:
    paths = [[owner_of(name) for name in names] for names in layers]
    owned = [(read, _owner(read, paths)) for read in reads]
    for place, (name, *_) in enumerate(layers):
        own = [read for read, owner in owned if owner == place]
        linear = [read for read in own if read.kind]
        last = name.rpartition(".")[2]
        if last not in WEIGHTS or not linear or not owner_of(name):
            continue
        kind = WEIGHTS[last] or linear[0].kind
        assert kind is not None  # such reads were asked for
        yield GraphSite(
            path=owner_of(name),
            name=name,
            kind=kind,
            columns=linear[0].columns,
            reads=tuple(own),
            refusal=_refusal(own, [read for read, owner in owned if owner != place], owned),
            own=any(read.path in paths[place] for read in linear),
            aliases=tuple(paths[place][1:]),
            others=tuple((read, layers[owner][0]) for read, owner in owned if owner not in (place, None)),
        )


def _owner(read: Read, paths: list[list[str]]) -> int | None:
    """The number of the layer that a read belongs to: that whose forward it stands in, or the only one below it."""
    if len(paths) == 1:
        return 0
    path = read.path
    exact = [place for place, layer in enumerate(paths) if path in layer]
    below = [place for place, layer in enumerate(paths) if path and any(own.startswith(f"{path}.") for own in layer)]
    found = exact or below
    return found[0] if len(found) == 1 else None


def _refusal(own: list[Read], others: list[Read], owned: list[tuple[Read, int | None]]) -> str | None:
    odd = next((read for read in own if read.kind is None), None)
    if odd is not None:
        return (
            f"its weight is read by {_describe(odd)} too, which would see it rotated. Leave it out with "
            "exclude_modules, or untie the two before the capture"
        )
    shared = {read.first for read in own} & {read.first for read in others}
    stray = next((read for read, owner in owned if owner is None or read.first in shared), None)
    if stray is not None:
        return (
            f"its weight has several names, and nothing tells whose the read by {_describe(stray)} is. Untie them "
            "before the capture, or leave it out with exclude_modules"
        )
    if len({read.columns for read in own}) > 1:
        rows, columns = (next(read for read in own if read.columns is side) for side in (False, True))
        return (
            f"its weight is read as it is by {_describe(rows)}, and transposed by {_describe(columns)}, so that no "
            "side of it is that of the inputs. Leave it out with exclude_modules"
        )
    return None


def _describe(read: Read) -> str:
    path = module_path(read.reader)
    where = "" if path is None else f" in {path or 'the root module'}"
    return f"{read.reader.target} (node {read.reader.name!r}{where})"
