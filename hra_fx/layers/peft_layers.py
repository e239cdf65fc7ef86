"""Find the layers of PEFT in a model, and refuse them with a fix."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hra_fx.compat import loaded_class
from hra_fx.errors import AdapterError, UnsupportedLayerError
from hra_fx.layers.class_swap import SwapMixin, original_class

#: Packages with classes that have methods with the same names. The methods of `HRAModel` replace these.
_REPLACED = ("transformers.", "diffusers.", "huggingface_hub.", "hra_fx.")


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of any PEFT method, which wraps a base layer."""
    return isinstance(module, loaded_class("peft.tuners.tuners_utils", "BaseTunerLayer"))


def is_peft_hra_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's HRA."""
    return isinstance(module, loaded_class("peft.tuners.hra", "HRALayer"))


def is_of_peft(module: nn.Module) -> bool:
    """Whether the class of a module is one of PEFT's, or derived from one."""
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def find_peft_layer(model: nn.Module) -> tuple[str, str] | None:
    """The path of the first PEFT layer in a model, and a suggestion what to do; `None` if there is none."""
    for path, module in model.named_modules():
        if is_peft_layer(module):
            keep = "Call hra_fx.from_peft(model) to use it with hra_fx, or" if is_peft_hra_layer(module) else "Call"
            return path, f"{keep} `merge_and_unload()` or `unload()` on the PEFT model first."
    return None


def refuse_peft_layers(model: nn.Module) -> None:
    """Raise an error if a model has PEFT layers. The message names the first one and a fix."""
    if found := find_peft_layer(model):
        raise UnsupportedLayerError(f"{found[0]}: it already has a PEFT adapter. {found[1]}")


def _refuse_tuner(module: nn.Module, _: str, child: nn.Module | None) -> None:
    """Raise an error if a tuner of PEFT gets a model of hra_fx. torch calls this for every child of every module."""
    tuner: Any = loaded_class("peft.tuners.tuners_utils", "BaseTuner")
    # A tuner with a class of hra_fx is one that `from_peft` took over.
    is_new = child is not None and isinstance(module, tuner) and not isinstance(module, SwapMixin)
    if is_new and any(isinstance(part, SwapMixin) for part in child.modules()):  # type: ignore[union-attr]
        raise UnsupportedLayerError(
            "PEFT cannot add an adapter to a model with adapters of hra_fx, because it would merge a LoRA as "
            "(W + B A) Q. Call hra_fx.fold(model) first, or add an adapter of hra_fx with hra_fx.add_adapter."
        )


register_module_module_registration_hook(_refuse_tuner)


def public_names(methods: type) -> set[str]:
    """The public names that a mixin adds to the class of a module."""
    return {name for name in {*dir(methods)} - {*dir(SwapMixin)} if not name.startswith("_")}


def refuse_hidden_names(model: nn.Module, methods: type) -> None:
    """Raise an error if a model has PEFT layers, or attributes that the public names of `methods` would hide."""
    refuse_peft_layers(model)
    cls = original_class(model)
    for name in sorted(public_names(methods)):
        home = next((f"{base.__module__}." for base in cls.__mro__ if name in vars(base)), "")
        if hasattr(model, name) and not home.startswith(_REPLACED):
            raise AdapterError(
                f"{name}: {cls.__name__} has an attribute of this name, which {methods.__name__} would hide. Rename "
                "it, or use hra_fx.transform and the functions of hra_fx instead."
            )
