"""The chain of reflections of an adapter, and the tensors that it is computed from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.pairs import from_pairs

#: The bits of `ChainPart.form`.
_PAIRS, _GS, _KEPT = 1, 2, 4


class ChainPart(NamedTuple):
    """One adapter in the chain of a layer. Tensors may have more dimensions in front: layers, or experts.

    Attributes:
        trained: the parameter: vectors `U: (d, r)`, or pairs of them, `(d, r / 2, 2)`.
        kept: orthonormal columns `V: (d, n)`, the directions that the adapter does not change.
        apply_GS: whether Gram-Schmidt makes the vectors orthonormal.
        pairs: whether `trained` contains pairs.
    """

    trained: Tensor
    kept: Tensor | None = None
    apply_GS: bool = False
    pairs: bool = False

    # Methods, because torch 2.10's TorchDynamo cannot trace properties of a NamedTuple.

    def form(self) -> int:
        """A number that says which tensors the part has, and how its chain is computed."""
        return _KEPT * (self.kept is not None) + _GS * self.apply_GS + self.pairs

    @staticmethod
    def size(form: int) -> int:
        """The number of tensors of a part of this form."""
        return 2 if form & _KEPT else 1

    @staticmethod
    def of_form(form: int, trained: Tensor, kept: Tensor | None = None) -> ChainPart:
        """A part of this form."""
        return ChainPart(trained, kept, bool(form & _GS), bool(form & _PAIRS))

    def vectors(self) -> Tensor:
        """The vectors `(..., d, r)`: `U`, without its part along `V`. With Gram-Schmidt, before it."""
        vectors = from_pairs(self.trained) if self.pairs else self.trained
        return vectors if self.kept is None else without(vectors, self.kept)

    def chain(self) -> Tensor:
        """The plain reflections `(..., d, r)`: the vectors, or their Gram-Schmidt basis.

        They are in at least float32, except for vectors that are used as they are.
        """
        return householder.orthonormalize(self.vectors()) if self.apply_GS else self.vectors()


def without(vectors: Tensor, kept: Tensor) -> Tensor:
    """Vectors `(..., d, r)` without their part along orthonormal columns `(..., d, n)`, in at least float32."""
    with householder.without_autocast(vectors):
        wide = vectors.to(householder.working_dtype(vectors.dtype))
        basis = kept.to(wide.dtype)
        rest: Tensor = wide - basis @ (basis.mT @ wide)
    return rest
