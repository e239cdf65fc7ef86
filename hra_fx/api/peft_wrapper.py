"""A `PeftModel` whose layers hra_fx took over: PEFT's methods are then those of its base model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hra_fx.checkpoint.folder import PREFIX
from hra_fx.layers.class_swap import SwapMixin, swap
from hra_fx.layers.peft_layers import is_of_peft

#: What PEFT's classes store in the object. These are now the properties of the base model.
_STORED = ("active_adapter", "peft_config")


class TakenOver(SwapMixin):
    """A `PeftModel`, or the tuner in it. All public attributes of PEFT are those of the base model, an `HRAModel`."""

    _hra_is_taken_over = True

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace the attributes that PEFT's classes define, and keep the signature of `forward`."""
        theirs = [part for part in base.__mro__ if part.__module__.startswith("peft.")]
        names = {"_keys_to_ignore_on_save", *_STORED}.union(
            name for part in theirs for name in vars(part) if not name.startswith("_") and name not in vars(cls)
        )

        @functools.wraps(base.forward)
        def forward(self: TakenOver, *args: Any, **kwargs: Any) -> Any:
            return self.get_base_model()(*args, **kwargs)

        return {name: OfModel(name) for name in names} | {"forward": forward}

    def get_base_model(self) -> Any:
        """The base model."""
        return self._modules.get("base_model", self).model  # type: ignore[union-attr]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state of this object, or of the base model, as a checkpoint of the Trainer has it."""
        if "base_model" not in self._modules:  # the tuner
            return super().load_state_dict(state_dict, *args, **kwargs)
        of_base = {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}
        own = of_base or {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
        return self.get_base_model().load_state_dict(own, *args, **kwargs)


class OfModel:
    """An attribute of `get_base_model()`. Unlike a property, it can be replaced: FSDP2 wraps `generate`."""

    def __init__(self, name: str) -> None:
        """Store the name of the attribute."""
        self.name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        """The attribute of the model; in the class, this object."""
        return self if wrapper is None else getattr(wrapper.get_base_model(), self.name)


def hand_over(model: nn.Module, root: nn.Module) -> None:
    """Make PEFT's wrappers around `root` in `model` use the methods of `root`."""
    inside = set(root.modules())
    for module in model.modules():
        if is_of_peft(module) and module not in inside:
            for name in _STORED:
                vars(module).pop(name, None)
            swap(module, TakenOver)
