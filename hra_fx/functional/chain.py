"""The chain of reflections of an adapter, and the tensors that it is computed from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hra_fx.functional import householder


class ChainPart(NamedTuple):
    """One adapter in the chain of a layer: `U: (d, r)`, its anchor `A: (d, a)`, and whether it uses Gram-Schmidt."""

    vectors: Tensor
    anchor: Tensor | None = None
    apply_GS: bool = False

    # Methods, because torch 2.10's TorchDynamo cannot trace properties of a NamedTuple.

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the part is computed from."""
        return (self.vectors,) if self.anchor is None else (self.vectors, self.anchor)

    def signature(self) -> tuple[object, ...]:
        """The properties that must be equal for parts to be computed in one batch."""
        vectors, anchor, apply_GS = self
        return apply_GS, vectors.shape, vectors.dtype, vectors.device, None if anchor is None else anchor.shape


def plain_chain(vectors: Tensor, anchor: Tensor | None, *, apply_GS: bool) -> Tensor:
    """Convert vectors `(..., d, r)` and an anchor `(..., d, k)` to plain reflections `(..., d, k + r)`.

    The result is `[A | U]` in the dtype of `vectors`, or `[A | V]` with Gram-Schmidt, at least float32.
    """
    chain = householder.orthonormalize(vectors) if apply_GS else vectors
    return chain if anchor is None else torch.cat([anchor.to(chain.dtype), chain], dim=-1)
