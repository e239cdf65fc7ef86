"""Reflections of a batch with different adapters for its rows: two batched products per layer, for any number."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.chain import ChainPart, plain_chain
from hra_fx.kernels.factors import Factors
from hra_fx.kernels.linear import reflect_each


class RowFactors(NamedTuple):
    """`R` and `F` of several adapters of one layer, `(m, k, d)`, and the adapter of each row of the batch, `(n,)`.

    `places` is `None` if row `i` has adapter `i`.
    """

    rows: Tensor
    down: Tensor
    places: Tensor | None


def stack_chains(parts: Sequence[ChainPart | None]) -> ChainPart:
    """Stack the chains of several adapters of one layer, in order, as `(m, d, r)` for `batched_factors`.

    Adapters of different kinds are converted to plain reflections and padded with zeros, which give the identity. At
    least one part is not `None`, which means the identity.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    if len(present) == len(parts) and len({part.signature() for part in present}) == 1:
        anchors = [part.anchor for part in present if part.anchor is not None]
        vectors = torch.stack([part.vectors for part in present])
        return ChainPart(vectors, torch.stack(anchors) if anchors else None, first.apply_GS)
    dtype = functools.reduce(torch.promote_types, [part.vectors.dtype for part in present], torch.float32)
    chains = [None if part is None else _plain(part, dtype) for part in parts]
    rank = max([chain.shape[1] for chain in chains if chain is not None])
    nothing = torch.zeros_like(first.vectors[:, :1], dtype=dtype)
    filled = [nothing if chain is None else chain for chain in chains]
    return ChainPart(torch.stack([F.pad(chain, (0, rank - chain.shape[1])) for chain in filled]))


def _plain(part: ChainPart, dtype: torch.dtype) -> Tensor:
    with householder.without_autocast(part.vectors):
        return plain_chain(part.vectors.to(dtype), part.anchor, apply_GS=part.apply_GS)


def pick(factors: RowFactors) -> Factors:
    """`R` and `F` of each row of the batch, `(n, k, d)`."""
    rows, down, places = factors
    return Factors(*(part if places is None else part.index_select(0, places) for part in (rows, down)))


def reflect_mixed(x: Tensor, factors: RowFactors) -> Tensor:
    """Apply the chain of each row of the batch: `x Q^T`.

    `x: (n, ..., d)` may also have a multiple of `n` rows, with adjacent copies of each row.
    """
    own = pick(factors)
    return reflect_each(x.reshape(len(own.rows), -1, x.shape[-1]), own).view(x.shape)
