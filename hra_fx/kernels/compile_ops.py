r"""Reflected rows as operators: TorchDynamo records each as one node, which the passes share and hoist can find.

    hra_fx::reflected_rows(x, vectors) -> Tensor            the reflected input of one layer
    hra_fx::unit_factors(vectors[]) -> Tensor[]             normalized chains of several layers, then their factors `T`
    hra_fx::reflected_by(x, chains[], factors[]) -> Tensor[]    the reflected inputs of several layers with one input

`x` is `(..., d)`, vectors and chains are `(d, k)`, factors `(k, k)`. The operators are composite: AOTAutograd and
Inductor decompose them, and their gradients, into ATen operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder

# torch does not type its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("reflected_rows(Tensor x, Tensor vectors) -> Tensor", tags=_TAGS)
_LIBRARY.define("unit_factors(Tensor[] vectors) -> Tensor[]", tags=_TAGS)
_LIBRARY.define("reflected_by(Tensor x, Tensor[] chains, Tensor[] factors) -> Tensor[]", tags=_TAGS)

#: The overloads that are the targets of graph nodes.
REFLECTED_ROWS = torch.ops.hra_fx.reflected_rows.default
UNIT_FACTORS = torch.ops.hra_fx.unit_factors.default
REFLECTED_BY = torch.ops.hra_fx.reflected_by.default


def plain_rows(x: Tensor, vectors: Tensor) -> Tensor:
    """The reflected input `x Q^T: (..., d)` of one layer.

    Example:
        >>> plain_rows(torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0], [0.0]]))
        tensor([[-2.,  5.]])
    """
    chain, factor = unit_factors([vectors])
    return reflected_by(x, [chain], [factor])[0]


def unit_factors(vectors: Sequence[Tensor]) -> list[Tensor]:
    """The normalized chains of several layers, then their factors; computed in one batch if their shapes are equal.

    Example:
        >>> chain, factor = unit_factors([torch.tensor([[3.0], [0.0]])])
        >>> chain.T, factor
        (tensor([[1., 0.]]), tensor([[2.]]))
    """
    if len({(one.shape, one.dtype) for one in vectors}) == 1 and len(vectors) > 1:
        chains = householder.normalize(torch.stack(list(vectors)))
        return [*chains.unbind(), *householder.compact_wy(chains).unbind()]
    each = [householder.normalize(one) for one in vectors]
    return [*each, *map(householder.compact_wy, each)]


def reflected_by(x: Tensor, chains: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """The reflected inputs of several layers that have one input, with one product `x [U_1 U_2 ...]` for all.

    Example:
        >>> [rows] = reflected_by(torch.tensor([[2.0, 5.0]]), *([one] for one in unit_factors([torch.eye(2)[:, :1]])))
        >>> rows
        tensor([[-2.,  5.]])
    """
    rows = x.reshape(-1, x.shape[-1])
    joined = chains[0] if len(chains) == 1 else torch.cat(list(chains), dim=1)
    projected = torch.split(joined.to(x.dtype).mT @ rows.mT, [chain.shape[1] for chain in chains])
    parts = zip(projected, chains, factors, strict=True)
    low_rank = [((factor @ part.to(factor.dtype)).to(x.dtype), chain.to(x.dtype)) for part, chain, factor in parts]
    return [(rows - (part.mT @ chain.mT).to(x.dtype)).view(x.shape) for part, chain in low_rank]


for _name, _function in (
    ("reflected_rows", plain_rows),
    ("unit_factors", unit_factors),
    ("reflected_by", reflected_by),
):
    _LIBRARY.impl(_name, _function, "CompositeImplicitAutograd")
