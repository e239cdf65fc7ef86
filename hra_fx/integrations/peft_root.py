"""The factors of all accelerated layers of a `PeftModel`, computed in batches at the start of its forward.

Around each forward and `generate`, a `PeftModel` enters `_enable_peft_forward_hooks` of its inner model, if that has
the method (PEFT's LoRA does, for mixed batches). Layers that are injected into a model without a `PeftModel` compute
their own factors.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hra_fx.compat import is_replica
from hra_fx.integrations.peft_layers import AcceleratedLayer
from hra_fx.layers.batching import factors_in_batches
from hra_fx.layers.sharding import is_sharded

_AROUND = "_enable_peft_forward_hooks"


def set_batches(*, enabled: bool) -> None:
    """Compute the factors of PEFT's HRA models in batches, or stop doing so."""
    tuner = importlib.import_module("peft").HRAModel
    current = vars(tuner).get(_AROUND)
    if enabled:
        setattr(tuner, _AROUND, _with_batches(current))
    elif (own := current.own) is not None:
        setattr(tuner, _AROUND, own)
    else:
        delattr(tuner, _AROUND)


def _with_batches(own: Any) -> Any:
    """The method, which also calls PEFT's `own`."""

    @contextmanager
    def around(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with ExitStack() as block:
            if own is not None:
                block.enter_context(own(self, *args, **kwargs))
            if sites := _sites(self):
                block.enter_context(factors_in_batches(sites))
            yield

    around.own = own  # type: ignore[attr-defined]
    return around


def _sites(tuner: nn.Module) -> list[nn.Module]:
    """The active layers of a model; empty if their factors cannot be batched (see `hra_fx.model.root`)."""
    if torch.compiler.is_compiling() or is_replica(tuner) or is_sharded(tuner):
        return []
    layers = (module for module in tuner.modules() if isinstance(module, AcceleratedLayer))
    return [site for layer in layers if (site := layer.acting()) is not None]
