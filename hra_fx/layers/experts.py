"""Adapted experts: the container of their vectors, and the module that has their 3-D parameters.

While the model runs, `owner.<parameter>` is `W_e Q_e` of all experts, a plain tensor, as in PEFT's `ParamWrapper`. At
any other time it is the parameter.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx import compat
from hra_fx.errors import AdapterError
from hra_fx.layers.adapters import AdapterSpec, HouseholderAdapters
from hra_fx.layers.class_swap import SwapMixin, swap, unswap
from hra_fx.layers.experts_weight import CHILD, ExpertsWeight
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, Reader, Run, sources_of
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.weight import read_weight, running


class ExpertsAdapters(HouseholderAdapters):
    """The adapters of one 3-D parameter. Each expert has its own reflections: `U: (experts, d, r)`."""

    def __init__(self, layer: ExpertsWeight) -> None:
        """Create an empty container for the experts of a parameter."""
        super().__init__(layer.width, "experts", fan_in_fan_out=layer.fan_in_fan_out)
        self.experts = layer.experts

    def initial(self, spec: AdapterSpec, dtype: torch.dtype) -> Tensor:
        """Create new vectors for every expert, `(experts, d, r)`."""
        return torch.stack([super(ExpertsAdapters, self).initial(spec, dtype) for _ in range(self.experts)])

    def vectors_shape(self, r: int) -> tuple[int, ...]:
        """The shape of the vectors of an adapter of rank `r`: `(experts, d, r)`."""
        return self.experts, self.width, r


class AdaptedExperts(SwapMixin):
    """A module with adapted 3-D parameters."""

    def __getattr__(self, name: str) -> Any:
        """Return `W Q` for the name of an adapted parameter while the model runs, and otherwise the attribute."""
        layer = vars(self).get("_modules", {}).get(CHILD + name)
        if not isinstance(layer, ExpertsWeight) or name not in self._parameters:
            return super().__getattr__(name)
        return read_weight(layer) if RUNNING.reader is None else _read_once(layer, RUNNING.reader)

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Run the forward of `base`. It computes `W Q` once, also if it loops over experts and reads it for each."""
        run = running(base.forward)

        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            for layer in adapted_parameters(self):
                if layer.parameter in self.__dict__:
                    raise AdapterError(
                        f"{type(self).__name__}.{layer.parameter}: FSDP1 and DataParallel replace parameters of "
                        "experts by plain tensors, so the adapter would not act. Use DistributedDataParallel or FSDP2."
                    )
            return run(self, *args, **kwargs)

        return {"forward": forward}


def _read_once(layer: ExpertsWeight, reader: Reader) -> Any:
    """`W Q` for all reads in one forward, unless a tensor that it depends on has changed."""
    is_eager, key = compat.is_plain_eager(), (layer, torch.is_grad_enabled())
    weight, run, sources = reader.experts.get(key, (None, WITHOUT_FACTORS, []))
    if weight is not None and (not is_eager or run.is_valid(sources)):
        return weight
    weight = read_weight(layer)
    if is_eager:
        adapters: Any = layer._modules[REFLECTION]
        vectors = [place for _, held in adapters.places() for place in held]
        holders, names = zip((layer.owner._parameters, layer.parameter), *vectors, strict=True)
        run, sources = Run.now(), sources_of(holders, names, list(map(dict.get, holders, names)))
    reader.experts[key] = weight, run, sources
    return weight


def adapted_parameters(owner: nn.Module) -> list[ExpertsWeight]:
    """The layers that represent the adapted parameters of a module."""
    return [child for child in owner._modules.values() if isinstance(child, ExpertsWeight)]


def attach(layer: ExpertsWeight) -> None:
    """Make a layer a child of its owner, which then reads its parameter through this layer."""
    swap(layer.owner, AdaptedExperts)
    layer.owner._modules[CHILD + layer.parameter] = layer


def detach(layer: ExpertsWeight) -> None:
    """Undo `attach`."""
    layer.owner._modules.pop(CHILD + layer.parameter, None)
    if not adapted_parameters(layer.owner):
        unswap(layer.owner, AdaptedExperts)
