"""Check that the methods of `HRAModel` hide no attribute of a model."""

from __future__ import annotations

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.class_swap import SwapMixin, original_class, swapped_class
from hra_fx.layers.peft_layers import refuse_peft_layers

#: Packages whose classes have methods of these names, which those of `HRAModel` replace.
_REPLACED = ("transformers.", "diffusers.", "huggingface_hub.", "hra_fx.")


def check_names(model: nn.Module, mixin: type[SwapMixin]) -> None:
    """Check that a subclass of the class can be made, and that it hides no attribute of the model.

    Raises:
        AdapterError: naming the class or the attribute.
        UnsupportedLayerError: the model has adapters of PEFT, whose wrapper has attributes of these names.
    """
    refuse_peft_layers(model)
    kind = original_class(model)
    try:
        swapped_class(mixin, kind)
    except Exception as error:
        raise AdapterError(f"{kind.__name__} cannot be subclassed ({type(error).__name__}: {error}).") from error
    for name in vars(mixin):
        if name.startswith("_"):
            continue
        held = any(name in space for space in (model._modules, model._parameters, model._buffers, vars(model)))
        home = next((base for base in kind.__mro__ if name in vars(base)), None)
        if held or (home and not f"{home.__module__}.".startswith(_REPLACED)):
            raise AdapterError(
                f"{name}: {kind.__name__} has an attribute of this name, which HRAModel would hide. Rename it, or use "
                "hra_fx.transform and the functions of hra_fx instead."
            )
