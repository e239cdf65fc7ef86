"""The adapters of the experts in one 3-D parameter: every expert has its own reflections, `U: (experts, d, r)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hra_fx.functional import householder
from hra_fx.functional.chain import ChainPart
from hra_fx.functional.rotate import as_rows
from hra_fx.kernels.factors import Factors, wy_factors
from hra_fx.layers.accelerate_hooks import loaded
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.experts_weight import ExpertsWeight


class ExpertsAdapters(HouseholderAdapters):
    """Adapter name -> `U: (experts, d, r)`; anchors and chains have the same first dimension."""

    def __init__(self, layer: ExpertsWeight) -> None:
        """Create an empty container for the experts of a parameter."""
        super().__init__(layer.width, "experts", fan_in_fan_out=layer.fan_in_fan_out)
        self.experts = layer.experts

    def initial(self, spec: AdapterSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Create new vectors for every expert, `(experts, d, r)`, and their anchors."""
        made = [super(ExpertsAdapters, self).initial(spec, dtype) for _ in range(self.experts)]
        anchors = [anchor for _, anchor in made if anchor is not None]
        return torch.stack([vectors for vectors, _ in made]), torch.stack(anchors) if anchors else None

    def vectors_shape(self, r: int) -> tuple[int, ...]:
        """The shape of the vectors of an adapter of rank `r`: `(experts, d, r)`."""
        return self.experts, self.width, r

    def rows(self, weight: Tensor) -> Tensor:
        """The weights as matrices `(experts, out, d)`."""
        return as_rows(weight, transposed=self.fan_in_fan_out, batched=True)

    def vectors_at(self, index: Any) -> Tensor | None:
        """The vectors of all active adapters, `(experts, d, k)`; `None` for the identity.

        `index` selects experts from the first dimension. An integer gives `(d, k)`.
        """
        many = isinstance(index, Tensor) and index.dim() > 0
        early, late = (None, index) if many else (index, None)
        with loaded(self):  # this module is never called, so a hook that offloads it does not run
            parts = self.chain_parts()
            if not parts:
                return None
            self.check_data()
            chains = [_chain(part, early) for part in parts]
        chain = chains[0] if len(chains) == 1 else torch.cat(chains, dim=-1)
        return chain if late is None else chain[late]

    def factors_at(self, index: Any, dtype: torch.dtype) -> Factors | None:
        """The factors `R` and `F: (experts, k, d)` in `dtype`; see `vectors_at`."""
        many = isinstance(index, Tensor) and index.dim() > 0
        vectors = self.vectors_at(None if many else index)
        if vectors is None:
            return None
        with householder.without_autocast(vectors):
            wide = vectors.to(householder.working_dtype(vectors.dtype))
            rows, down = wy_factors(wide).to(dtype).unbind(dim=-3)
        return Factors(rows[index], down[index]) if many else Factors(rows, down)


def _chain(part: ChainPart, index: Any) -> Tensor:
    if index is not None:
        part = ChainPart.of_form(part.form(), **{name: getattr(part, name)[index] for name in part.names(part.form())})
    return part.chain()
