"""The vectors that an optimizer updates, in layers of hra_fx and of PEFT's HRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import ASGD, Optimizer

from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.peft_layers import is_peft_hra_layer
from hra_fx.layers.sharding import distribute_like, is_dtensor
from hra_fx.layers.target import REFLECTION
from hra_fx.model.state import check_is_module
from hra_fx.selection.suggestions import some_of


class Vectors(NamedTuple):
    """The vectors of an adapter in a layer.

    Attributes:
        path: the name of the parameter, `<layer>.hra_u.<adapter>`.
        tensor: the parameter. Tools may replace it, or flatten it.
    """

    layer: nn.Module
    path: str
    tensor: Any
    r: int
    apply_GS: bool

    @property
    def is_flat(self) -> bool:
        """Whether it is a part of a flat parameter (FSDP1, DeepSpeed ZeRO)."""
        return bool(self.tensor.dim() < 2 or self.tensor.shape[-1] != self.r)


def layers_with_vectors(model: Any) -> dict[nn.Module, str]:
    """Each layer of a model with adapters of hra_fx or PEFT's HRA -> its path."""
    check_is_module(model)
    return {
        module: path
        for path, module in model.named_modules()
        if get_adapters(module) is not None or is_peft_hra_layer(module)
    }


def vectors_of(layers: Mapping[nn.Module, str]) -> Iterator[Vectors]:
    """The vectors of all adapters of some layers."""
    for layer, path in layers.items():
        adapters: Any = layer._modules[REFLECTION]
        if is_peft_hra_layer(layer):
            peft: Any = layer
            facts = {name: (r, peft.hra_apply_GS[name]) for name, r in peft.hra_r.items()}
        else:
            facts = {name: (spec.r, spec.apply_GS) for name, spec in adapters.specs.items()}
        for name, (r, apply_GS) in facts.items():
            if (tensor := adapters._parameters.get(name)) is not None:
                yield Vectors(layer, f"{path}.{REFLECTION}.{name}", tensor, r, apply_GS)


def stepped_vectors(layers: Mapping[nn.Module, str], optimizer: Optimizer) -> list[Vectors]:
    """The vectors that an optimizer updates, found in each step, because FSDP2 and other tools replace parameters."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [one for one in vectors_of(layers) if id(one.tensor) in stepped]


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrappers."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def averages_parameters(optimizer: Optimizer) -> bool:
    """Whether an optimizer averages the parameters outside of its step: schedule-free optimizers and ASGD."""
    return isinstance(optimizer, ASGD) or callable(getattr(optimizer, "eval", None))


def required_vectors(layers: Mapping[nn.Module, str], optimizer: Any, model: Any, function: str) -> list[Vectors]:
    """Like `stepped_vectors`, but the result is never empty."""
    if not isinstance(optimizer, Optimizer):
        raise AdapterError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    found = stepped_vectors(layers, optimizer)
    if not found:
        raise AdapterError(
            f"the optimizer has no vectors of {type(model).__name__}. Adapt the model first, pass trainable vectors to "
            f"the optimizer, and call {function} before a tool flattens the parameters (FSDP1, DeepSpeed ZeRO)."
        )
    return found


def warn_of_zero_gradients(optimizer: Optimizer, layers: Mapping[nn.Module, str]) -> None:
    """Warn in the first step if the gradients of all vectors are zero. Later steps read no values."""
    checked = False

    def check(optimizer: Optimizer, *_: Any) -> None:
        nonlocal checked
        if checked:
            return
        found = [one for one in stepped_vectors(layers, optimizer) if one.tensor.grad is not None]
        checked = bool(found)  # a closure computes the gradients later
        if checked and not any(is_dtensor(one.tensor.grad) or one.tensor.grad.any() for one in found):
            paths = some_of([one.path for one in found])
            warnings.warn(
                f"the gradients of all vectors are zero in the first step: {paths}. They "
                "do not train while a later scale or head is zero. In a new ResNet of timm, frozen scales are zero: "
                "load pretrained weights, or pass zero_init_last=False.",
                HRAWarning,
                stacklevel=4,
            )

    optimizer.register_step_pre_hook(check)


def without_directions(vectors: Any, basis: Tensor) -> Any:
    """Vectors `(..., d, n)` without their parts along some directions `(..., d, k)`; also for shards."""
    own: Any = distribute_like(basis.to(vectors.device, vectors.dtype), vectors)
    return vectors - own @ (own.mT @ vectors)
