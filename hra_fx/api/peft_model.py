"""`HRAModel`, an adapted model with PEFT's methods; `PeftModel`, another name of PEFT for it; and `get_peft_model`.

The model object itself gets a new class, a subclass of its own class and `HRAModel`. So `isinstance` checks (Trainer,
pipelines, diffusers) still work, and a wrapper that forwards attributes is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hra_fx.api import pretrained
from hra_fx.api.load import load_adapter
from hra_fx.api.peft_class import BaseModel, PeftAttributes, adapt, add_methods
from hra_fx.config import HRAConfig
from hra_fx.layers.peft_layers import refuse_hidden_names
from hra_fx.model import merge, remove, switch, trainable
from hra_fx.model.fold import fold
from hra_fx.model.setup import add_adapter
from hra_fx.model.state import root_of


class HRAModel(PeftAttributes):
    """An adapted model with PEFT's methods: `HRAModel(model, config, adapter_name="default", low_cpu_mem_usage=False)`.

    This call adapts `model` in place and returns it. `get_peft_model`, `from_pretrained` and `from_peft` return such
    models too. Every function of hra_fx works on them, and `model.base_model` has their methods and attributes.

    Args:
        model: any module that `hra_fx.transform` accepts, changed in place.
        config: an `hra_fx.HRAConfig` or a `peft.HRAConfig`; `peft_config` is another name of this argument.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the vectors on the meta device, to be loaded later.

    Attributes:
        prefix: the prefix of the names of adapter parameters.
        tuner_layer_cls: the class of adapted layers.
        target_module_mapping: model type -> the layers that `target_modules=None` selects.

    Raises:
        AdapterError: `model` is a graph, or has an attribute with the name of one of PEFT's methods.
        HRAError: for other errors, see `hra_fx.transform`. After any error the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> adapted = HRAModel(model, HRAConfig(r=2, target_modules=["0"]), "default")
        >>> adapted is model, isinstance(model, HRAModel), isinstance(model[0], model.tuner_layer_cls)
        (True, True, True)
        >>> type(model.merge_and_unload()) is nn.Sequential
        True
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapt a model, which gets a class that is derived from this one."""
        if cls is HRAModel:
            return as_hra_model(adapt(HRAModel, *args, **kwargs))
        return super().__new__(cls, *args, **kwargs)

    # Functions whose first argument is the model.
    get_nb_trainable_parameters = trainable.count_parameters
    delete_adapter = remove.delete_adapter
    enable_adapter_layers = enable_adapters = switch.enable_adapters
    load_adapter = load_adapter
    set_adapter = switch.set_adapter
    unmerge_adapter = merge.unmerge_adapter
    push_to_hub = pretrained.push_to_hub
    save_pretrained = pretrained.save_pretrained
    create_or_update_model_card = pretrained.create_or_update_model_card

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
            refuse_hidden_names(model, HRAModel)
        return as_hra_model(load_adapter(model, *args, **kwargs))


class _BaseModel(BaseModel):
    """`base_model` of an `HRAModel`."""

    methods = HRAModel


def as_hra_model(model: nn.Module) -> nn.Module:
    """Add the methods of `HRAModel` to a transformed model. Call `refuse_hidden_names` before."""
    return add_methods(model, HRAModel, _BaseModel)


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
    adapted: Any = HRAModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    if revision is not None:
        adapted.peft_config[adapter_name].revision = revision
    return adapted


#: PEFT's name for the class whose `from_pretrained` loads an adapter into a base model.
PeftModel = HRAModel
