"""The container and the class of an adapted quantized layer."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.layers.adapted_layer import AdaptedLinear
from hra_fx.layers.quantized.call import call_quantized
from hra_fx.layers.sharding import call
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.variants import LinearAdapters


class QuantizedAdapters(LinearAdapters):
    """Reflects the input of a Linear with a quantized weight. Only other readers of the weight need its values."""

    def rotate(self, weight: Tensor) -> Tensor:
        """Compute `W Q` for the quantized weight of the layer."""
        return super().rotate(weight.dequantize())


class AdaptedQuantizedLinear(AdaptedLinear):
    """A quantized Linear that reflects its input. The input gets a gradient even if the library does not compute it."""

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Like `AdaptedLinear`, with a straight-through gradient if the library does not pass one."""
        is_torchao = base.forward is nn.Linear.forward

        def run(self: Any, x: Tensor) -> Any:
            return F.linear(x, self.hra_base, self.bias) if is_torchao else base.forward(self, x)

        @functools.wraps(base.forward)
        def forward(self: AdaptedQuantizedLinear, input: Tensor, reflected: Tensor | None = None) -> Any:
            if reflected is None:
                reflected = call(self.hra_u, input)
            return call_quantized(self, reflected, functools.partial(run, self))

        if base.state_dict is not nn.Module.state_dict:
            return {"forward": forward, "state_dict": functools.partialmethod(_whole_state_dict, base)}
        # The forward of bitsandbytes reads its packed weight itself; other code cannot use that weight.
        return {**super().wrap(base), "forward": forward} if is_torchao else {"forward": forward}


def _whole_state_dict(self: nn.Module, base: Any, *args: Any, **kwargs: Any) -> Any:
    """The state of a class with its own `state_dict`, which may leave out children (HQQ), with the adapters."""
    state = base.state_dict(self, *args, **kwargs)
    into, place = kwargs.get("destination"), f"{kwargs.get('prefix', '')}{REFLECTION}."
    self._modules[REFLECTION].state_dict(  # type: ignore[union-attr]
        destination=state if into is None else into, prefix=place, keep_vars=kwargs.get("keep_vars", False)
    )
    return state
