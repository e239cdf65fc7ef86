"""How a model and its `base_model` get PEFT's methods and attributes."""

from __future__ import annotations

import functools
import weakref
from typing import Any, ClassVar

import torch
from torch import fx, nn

from hra_fx.api.peft_wrapper import OfModel
from hra_fx.api.transform import transform
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.class_swap import SwapMixin, swap
from hra_fx.layers.peft_layers import public_names, refuse_hidden_names
from hra_fx.model.state import RECORD
from hra_fx.selection.origin import DEFAULT_TARGETS

#: `base_model` -> a reference to its model. An attribute would be copied and pickled.
_MODELS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


class PeftAttributes(SwapMixin):
    """The attributes of PEFT's `HRAModel`, and `base_model`."""

    _hra_priority = 3
    prefix: ClassVar[str] = "hra_"
    tuner_layer_cls: ClassVar[type[AdaptedLayer]] = AdaptedLayer
    target_module_mapping: ClassVar[dict[str, list[str] | str]] = {
        kind: names if isinstance(names, str) else list(names) for kind, names in DEFAULT_TARGETS.items()
    }

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Add `base_model`. A call of `HRAModel` must not initialize its model again."""

        @functools.wraps(base.__init__)
        def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if RECORD not in vars(self):
                base.__init__(self, *args, **kwargs)

        own = getattr(base, "base_model", None)  # a property of transformers: the model without its head

        def base_model(self: nn.Module) -> Any:
            body: Any = (
                own.fget(self) if isinstance(own, property) and own.fget else self._modules.get("base_model", self)
            )
            if isinstance(body, BaseModel) and not torch.compiler.is_compiling():
                _MODELS[body] = weakref.ref(self)
            return body

        return {"__init__": __init__, "base_model": property(base_model)}


class BaseModel(SwapMixin):
    """The `base_model` of a transformers model. It has the public attributes of the whole model, as in PEFT."""

    _hra_priority = 2
    methods: ClassVar[type[nn.Module]]

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace the attributes, also those that transformers has for PEFT."""
        return {name: OfModel(name) for name in public_names(cls.methods) - {"from_pretrained", "get_base_model"}}

    def get_base_model(self) -> Any:
        """The model whose `base_model` was read last."""
        model = _MODELS[self]() if self in _MODELS else None
        if model is None:
            raise AdapterError(f"{type(self).__name__} is a submodule of a transformed model. Use the model itself.")
        return model


def add_methods(model: nn.Module, methods: type[SwapMixin], of_base_model: type[SwapMixin]) -> nn.Module:
    """Add PEFT's methods to a transformed model. Call `refuse_hidden_names` before."""
    if isinstance(getattr(type(model), "base_model", None), property) and model.base_model is not model:
        swap(model.base_model, of_base_model)  # type: ignore[arg-type]
    swap(model, methods)
    return model


def adapt(
    methods: type[SwapMixin],
    model: nn.Module,
    config: HRAConfig | None = None,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    *,
    peft_config: HRAConfig | None = None,
) -> Any:
    """`hra_fx.transform` with the arguments of PEFT's `HRAModel`, for a model that can have the methods."""
    if isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"PEFT's methods cannot be added to a captured graph ({type(model).__name__}). Call "
            "hra_fx.transform(model, config), which returns a model of the same type."
        )
    if isinstance(model, nn.Module):
        refuse_hidden_names(model, methods)
    given: Any = peft_config if config is None else config
    return transform(model, given, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
