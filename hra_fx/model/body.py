"""The body of a transformers model (`model.base_model`), which TRL's trainers call past the forward of the model."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from torch import nn

from hra_fx.compat import is_exporting, is_replica
from hra_fx.kernels.dispatch import is_compiling
from hra_fx.layers.batching import factors_in_batches, is_in_forward
from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.sharding import is_sharded
from hra_fx.layers.target import REFLECTION


class AdaptedBody(SwapMixin):
    """The body of a transformed model: called alone, it computes the factors of its layers in batches as well."""

    _hra_priority = 1

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` of `base`; the factors of its layers are computed at its start, unless the model's forward runs."""

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if is_compiling() or is_exporting() or is_in_forward() or is_replica(self) or is_sharded(self):
                return base.forward(self, *args, **kwargs)
            with factors_in_batches([part for part in self.modules() if REFLECTION in part._modules]):
                return base.forward(self, *args, **kwargs)

        return {"forward": forward}


def swap_body(model: nn.Module, undo: ExitStack) -> None:
    """Swap the class of the body of a model, if it has one."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        undo.callback(unswap, body, AdaptedBody)
        swap(body, AdaptedBody)
