"""PEFT's names: `HRAModel`, an adapted model with PEFT's methods, `PeftModel` and `get_peft_model`.

The model object itself gets a new class, a subclass of its own class and `HRAModel`. So `isinstance` checks (Trainer,
pipelines, diffusers) still work, and a wrapper that forwards attributes is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from hra_fx.api.load import load_adapter
from hra_fx.api.transform import transform
from hra_fx.checkpoint.saving import create_or_update_model_card
from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.integrations import pretrained
from hra_fx.layers.class_swap import SwapMixin, original_class, swap
from hra_fx.layers.peft_layers import refuse_peft_layers
from hra_fx.model import merge, remove, switch, trainable
from hra_fx.model.fold import fold
from hra_fx.model.setup import add_adapter
from hra_fx.model.state import root_of

#: Packages with classes that have methods with the same names. The methods of `HRAModel` replace these.
_REPLACED = ("transformers.", "diffusers.", "huggingface_hub.", "hra_fx.")


class HRAModel(SwapMixin):
    """An adapted model with PEFT's methods, from `get_peft_model`, `from_pretrained` or `from_peft`.

    Every function of hra_fx works on it.

    Attributes:
        prefix: the prefix of the names of adapter parameters; TRL reads it.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> isinstance(model, HRAModel), model.active_adapters
        (True, ['default'])
        >>> type(model.merge_and_unload()) is nn.Sequential
        True
    """

    _hra_priority = 3
    prefix: str = "hra_"

    # Functions whose first argument is the model.
    get_nb_trainable_parameters = trainable.count_parameters
    delete_adapter = remove.delete_adapter
    enable_adapter_layers = enable_adapters = switch.enable_adapters
    load_adapter = load_adapter
    set_adapter = switch.set_adapter
    unmerge_adapter = merge.unmerge_adapter
    push_to_hub = pretrained.push_to_hub
    save_pretrained = pretrained.save_pretrained
    create_or_update_model_card = create_or_update_model_card

    @property
    def peft_config(self) -> dict[str, HRAConfig]:
        """Adapter name -> configuration."""
        return dict(root_of(self)[1].configs)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they are applied."""
        return list(root_of(self)[1].active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter; a list if there are several or none."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def get_base_model(self) -> nn.Module:
        """The model itself. To get a plain model, call `unload` or `merge_and_unload`."""
        return self

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters as PEFT does."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def add_adapter(self, adapter_name: str, peft_config: HRAConfig, low_cpu_mem_usage: bool = False) -> None:
        """Same as `hra_fx.add_adapter`."""
        add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)

    def disable_adapter(self) -> switch.disable_adapters:
        """Same as `hra_fx.disable_adapters`: `with model.disable_adapter():` runs the base model."""
        return switch.disable_adapters(self)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters until `enable_adapter_layers`."""
        switch.disable_adapters(self).__enter__()

    #: The name in transformers and diffusers.
    disable_adapters = disable_adapter_layers

    def merge_adapter(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        """Same as `hra_fx.merge_adapter`, after `set_adapter(adapter_names)`. It always checks the weights."""
        if adapter_names is not None:
            switch.set_adapter(self, adapter_names)
        merge.merge_adapter(self)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Fold the active adapters, or `adapter_names`, into the weights (`hra_fx.fold`), and remove the others.

        Returns:
            The model, now a plain base model.
        """
        if adapter_names is not None:
            switch.set_adapter(self, adapter_names)
        return fold(self)

    def unload(self) -> nn.Module:
        """Remove all adapters without folding them.

        Returns:
            The model, now the base model again.
        """
        if root_of(self)[1].merged:
            merge.unmerge_adapter(self)
        switch.set_adapter(self, [])
        for name in self.peft_config:
            remove.delete_adapter(self, name)
        return self

    @classmethod
    def from_pretrained(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        """`HRAModel.from_pretrained(base, directory, adapter_name="default", is_trainable=False)`.

        It takes the options of `hra_fx.load_adapter`. On the class of an adapted model, this is the `from_pretrained`
        of its base class.

        Returns:
            The adapted base model, as an `HRAModel`.

        Raises:
            HRAError: see `hra_fx.load_adapter`.
        """
        if cls is not HRAModel:
            own: Any = super()
            return own.from_pretrained(model, *args, **kwargs)
        if isinstance(model, nn.Module):
            check_names(model)
        return as_hra_model(load_adapter(model, *args, **kwargs))


def check_names(model: nn.Module) -> None:
    """Check that the methods of `HRAModel` do not hide attributes of the model."""
    refuse_peft_layers(model)
    cls = original_class(model)
    for name in vars(HRAModel):
        home = next((f"{base.__module__}." for base in cls.__mro__ if name in vars(base)), "")
        if not name.startswith("_") and hasattr(model, name) and not home.startswith(_REPLACED):
            raise AdapterError(
                f"{name}: {cls.__name__} has an attribute of this name, which HRAModel would hide. Rename it, or use "
                "hra_fx.transform and the functions of hra_fx instead."
            )


def as_hra_model(model: nn.Module) -> nn.Module:
    """Add the methods of `HRAModel` to a transformed model. Call `check_names` before."""
    if not isinstance(model, HRAModel):
        swap(model, HRAModel)
    return model


#: PEFT's name for the class whose `from_pretrained` loads an adapter into a base model.
PeftModel = HRAModel


def get_peft_model(
    model: nn.Module,
    peft_config: HRAConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Adapt a model in place and give it PEFT's methods, with the arguments of `peft.get_peft_model`.

    Args:
        model: any module that `hra_fx.transform` accepts, changed in place.
        peft_config: an `hra_fx.HRAConfig` or a `peft.HRAConfig`.
        adapter_name: name of the adapter.
        mixed, autocast_adapter_dtype: ignored, because all adapters are HRA and vectors are always at least float32.
        revision: revision of the base model, written into the configuration.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Returns:
        `model`, which is an `HRAModel` now.

    Raises:
        AdapterError: `model` is a graph, or has an attribute with the name of one of PEFT's methods.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 12 || all params: 40 || trainable%: 30.0000
    """
    if isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"PEFT's methods cannot be added to a captured graph ({type(model).__name__}). Call "
            "hra_fx.transform(model, config), which returns a model of the same type."
        )
    if isinstance(model, nn.Module):
        check_names(model)
    adapted: Any = as_hra_model(transform(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage))
    if revision is not None:
        adapted.peft_config[adapter_name].revision = revision
    return adapted
