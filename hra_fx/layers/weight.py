"""Whether `layer.weight` is `W` or `W Q`.

While a model runs, the weight of an adapted layer reads as `W Q`, a plain tensor with gradients, because attention,
Swin, Mamba and others use weights without calling their layers. At any other time it is the parameter `W`, as in PEFT:
optimizers, loaders, and code that moves or ties weights need the parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx import compat
from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.layers.accelerate_hooks import loaded, offloading_hook
from hra_fx.layers.adapters import get_adapters
from hra_fx.layers.class_swap import SwapMixin, mixins_of, original_class, swap
from hra_fx.layers.peft_layers import is_peft_layer
from hra_fx.layers.quantized.libraries import quant_scheme_of
from hra_fx.layers.readers import needs_parameters, reads_weights, writes_data
from hra_fx.layers.running import RUNNING, WITHOUT_FACTORS, Reader, during
from hra_fx.layers.sharding import is_dtensor
from hra_fx.layers.target import REFLECTION, weight_place


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight `W Q` with which a layer computes now, at any time. It is differentiable.

    `layer.weight` is `W Q` only while the model runs, and otherwise the parameter `W`.

    Args:
        layer: an adapted layer, or any module with a weight. For experts, it is the child `hra_<parameter>`.

    Returns:
        `W Q` for the active adapters, in the shape and dtype of the weight: `(out, d)` for a Linear, `(out, in/groups,
        ...)` for a convolution, `(d, out)` for transformers' `Conv1D`, `in_proj_weight` for `nn.MultiheadAttention`,
        `(experts, ...)` for experts. A quantized weight is dequantized. If no adapter acts, or adapters are merged, it
        is the weight itself.

    Raises:
        AdapterError: `layer` has no weight or is a layer of PEFT, the weight has no data, or this process has only a
            shard of it.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> config = HRAConfig(r=2, init_weights=False, target_modules=["0"])
        >>> model = transform(nn.Sequential(nn.Linear(6, 4, bias=False)), config)
        >>> x = torch.ones(1, 6)
        >>> torch.allclose(model(x), x @ effective_weight(model[0]).T, atol=1e-6)
        True
    """
    if isinstance(layer, nn.Module) and is_peft_layer(layer):
        raise AdapterError(
            f"`layer` is PEFT's {type(layer).__name__}. Pass `layer.get_base_layer()`, or call hra_fx.from_peft(model)."
        )
    adapters: Any = layer._modules.get(REFLECTION) if isinstance(layer, nn.Module) else None
    if adapters is None:
        weight = getattr(layer, "in_proj_weight", None) if isinstance(layer, nn.MultiheadAttention) else None
        weight = getattr(layer, "weight", None) if weight is None else weight
        if not isinstance(weight, Tensor):
            raise AdapterError(f"`layer` must be a module with a weight, got {type(layer).__name__}.")
        return weight
    with loaded(weight_place(layer)[0]):
        base: Tensor = adapters.weight_of(layer)
        if is_dtensor(base) or base.is_meta:
            raise AdapterError(
                f"{adapters.layer_path}: its weight is sharded or has no data, so W Q cannot be computed. Gather the "
                "parameters first, or load the weights."
            )
        scheme = quant_scheme_of(layer)
        rotated: Tensor = adapters(weight=base if scheme is None else scheme.values(layer))
        return rotated.to(base.dtype) if base.is_floating_point() else rotated


def weight_property(name: str) -> property:
    """The property `layer.<name>` of an adapted layer. The parameter itself stays in `_parameters`."""

    def read(self: nn.Module) -> Any:
        try:
            return read_weight(self)
        except AttributeError as error:  # Python would call nn.Module.__getattr__, which returns W
            if not _has_weight(self):
                raise
            raise RuntimeError(f"{type(self).__name__}: its weight cannot be rotated ({error})") from error

    def hold(self: nn.Module, weight: Any) -> None:
        """Store the weight as a plain attribute, as FSDP1 and DataParallel do during a forward."""
        vars(self)[name] = weight

    def drop(self: nn.Module) -> None:
        vars(self).pop(name, None)

    return property(read, hold, drop)


def _has_weight(layer: nn.Module) -> bool:
    owner, name = weight_place(layer)
    return name in owner._parameters or name in owner.__dict__


def read_weight(layer: nn.Module) -> Any:
    """The value of `layer.weight`: `W Q`, or the parameter."""
    adapters: Any = layer._modules.get(REFLECTION)
    if adapters is None or not _has_weight(layer):
        return nn.Module.__getattr__(layer, weight_place(layer)[1])
    base = adapters.weight_of(layer)
    if adapters.needs_parameter:
        return base
    if torch.compiler.is_compiling() or compat.is_fx_tracing():
        return adapters(weight=base)
    is_running = RUNNING.run is not None or compat.is_in_backward()  # a checkpointed block runs again in the backward
    if not is_running or _must_be_parameter(layer, base) or not adapters.places():
        return base
    if adapters.reflects_input:
        adapters.is_read = True
    found: Tensor = adapters(weight=base)
    if RUNNING.reader is not None and compat.is_plain_eager() and not found.is_inference():
        watched = found.detach()
        watched.data = watched.new_empty(0)
        RUNNING.reader.read.append((layer, watched, compat.VERSION(watched)))
    return found


def _must_be_parameter(layer: nn.Module, base: Any) -> bool:
    """Whether code that reads a weight inside of a forward moves or shards the parameter.

    accelerate's hook reads and replaces the weight of an offloaded layer by its name, and so does FSDP1. FSDP2 reads
    its shards: while a module runs, its parameters are whole.
    """
    if is_dtensor(base) or base.is_meta or getattr(base, "_fsdp_flattened", False):
        return True
    owner, _ = weight_place(layer)
    return offloading_hook(owner) is not None and (RUNNING.reader is None or RUNNING.reader.module is not owner)


class ReadsWeights(SwapMixin):
    """A module whose forward reads weights of adapted layers. They read as `W Q` too if it is called alone."""

    _hra_priority = 1

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Wrap `forward` of `base`."""
        return {"forward": running(base.forward)}


def mark_readers(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
    """Mark the modules that use weights of adapted layers in their code."""
    new = set(layers.values())
    # All paths of the new layers, also of shared ones, with the names that checkpoint wrappers insert; and of experts.
    places = {path: module for path, module in modules.items() if module in new} | dict(layers)
    around = {".".join(path.split(".")[:depth]) for path in places for depth in range(path.count(".") + 1)}
    owners = [modules[path] for path in sorted({"", *around}) if path in modules]
    # The forward of a layer that reflects its input is that of torch.
    reading = [layer for layer in places.values() if not layer._modules[REFLECTION].reflects_input]  # type: ignore[union-attr]
    for cls in sorted({original_class(part) for part in (*owners, *reading)}, key=lambda cls: cls.__name__):
        if writes_data(cls) and not needs_parameters(cls):
            raise UnsupportedLayerError(
                f"{next(iter(layers))}: the forward of {cls.__name__} uses the `data` of a weight. Weights are W Q "
                "while the model runs, so a change would be lost. Leave the layers whose data it uses out with "
                "exclude_modules."
            )
    for owner in owners:
        if needs_parameters(original_class(owner)):
            for adapters in filter(None, map(get_adapters, owner.modules())):
                adapters.needs_parameter = True
        # fx creates a class for each graph.
        if isinstance(owner, fx.GraphModule) or REFLECTION in owner._modules or ReadsWeights in mixins_of(owner):
            continue
        if reads_weights(original_class(owner)):
            swap(owner, ReadsWeights)


def running(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a forward so that a model runs during its calls, and refuse writes into the weights that it reads."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outer = RUNNING.reader
        reader = RUNNING.reader = Reader(self, [], {})
        try:
            output = during(RUNNING.run or WITHOUT_FACTORS, forward, self, *args, **kwargs)
        finally:
            RUNNING.reader = outer
        if written := [layer for layer, weight, version in reader.read if compat.VERSION(weight) != version]:
            adapters: Any = written[0]._modules[REFLECTION]
            raise AdapterError(
                f"{adapters.layer_path}: the forward of the model writes into its {weight_place(written[0])[1]}. It is "
                "W Q while the model runs, so the change would be lost. Write outside of the forward, or leave the "
                "layer out with exclude_modules."
            )
        return output

    return run
