"""A `PeftModel` whose layers hra_fx took over: PEFT's methods are then those of its base model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from hra_fx.api.peft_model import HRAModel
from hra_fx.checkpoint.folder import PREFIX
from hra_fx.errors import AdapterError
from hra_fx.layers.class_swap import SwapMixin, swap
from hra_fx.layers.peft_layers import is_of_peft


class TakenOver(SwapMixin):
    """A `PeftModel`, or the tuner in it. All public attributes of PEFT are those of the base model, an `HRAModel`."""

    _hra_is_taken_over = True

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace the attributes that PEFT's classes define, and keep the signature of `forward`."""
        theirs = [part for part in base.__mro__ if part.__module__.startswith("peft.")]
        names = {"active_adapter", "peft_config"}.union(*map(vars, theirs))
        wrapped = {name: _of_base(base, name) for name in names if not name.startswith("_") and name not in vars(cls)}

        @functools.wraps(base.forward)
        def forward(self: TakenOver, *args: Any, **kwargs: Any) -> Any:
            return self.get_base_model()(*args, **kwargs)

        return {**wrapped, "forward": forward}

    def get_base_model(self) -> Any:
        """The base model."""
        return self._modules.get("base_model", self).model  # type: ignore[union-attr]

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """The Trainer allows these keys to be missing when it resumes."""
        return _adapted_base(self, "_keys_to_ignore_on_save")._keys_to_ignore_on_save

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state of this object, or of the base model, as a checkpoint of the Trainer has it."""
        if "base_model" not in self._modules:  # the tuner
            return super().load_state_dict(state_dict, *args, **kwargs)
        of_base = {key: value for key, value in state_dict.items() if not key.startswith(PREFIX)}
        own = of_base or {key.removeprefix(PREFIX): value for key, value in state_dict.items()}
        return self.get_base_model().load_state_dict(own, *args, **kwargs)


class _MethodOfBase:
    """A method of the base model. Unlike a property, it can be replaced: FSDP2 wraps `generate` of an object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: TakenOver | None, owner: type) -> Any:
        return self if wrapper is None else getattr(_adapted_base(wrapper, self.name), self.name)


def _of_base(base: type[nn.Module], name: str) -> Any:
    if callable(getattr(base, name, None)):
        return _MethodOfBase(name)
    return property(lambda self: getattr(_adapted_base(self, name), name))


def _adapted_base(wrapper: TakenOver, name: str) -> Any:
    base = wrapper.get_base_model()
    if not isinstance(base, HRAModel):
        raise AdapterError(
            f"{name}: the adapters of this {type(wrapper).__name__} were folded or removed. Use the base model, a "
            f"{type(base).__name__}: the result of hra_fx.fold, or get_base_model()."
        )
    return base


def hand_over(model: nn.Module, root: nn.Module) -> None:
    """Make PEFT's wrappers around `root` in `model` use the methods of `root`."""
    inside = set(root.modules())
    for module in model.modules():
        if is_of_peft(module) and module not in inside:
            swap(module, TakenOver)
