"""The carrier of a whole model of transformers or diffusers: what these do with models must not lose its adapters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.keys import adapter_entries
from hra_fx.checkpoint.saving import save_pretrained
from hra_fx.errors import AdapterError
from hra_fx.integrations.resize_embeddings import resizable
from hra_fx.layers.class_swap import original_class
from hra_fx.model.root import RootCarrier
from hra_fx.model.state import record_of


class PretrainedCarrier(RootCarrier):
    """A model with adapters whose class knows `save_pretrained`, which writes those, as transformers does with PEFT's.

    The base class would write base weights and vectors into one file, and drop the vectors when it is loaded.
    """

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """What the model's own class does with weights, where it has that: diffusers fuses projections."""
        methods = super().wrap(base)
        if hasattr(base, "fuse_qkv_projections"):
            methods["fuse_qkv_projections"] = _fuse_unless_adapted(base)
        return methods

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: Iterable[str] | None = None,
        safe_serialization: bool = True,
        push_to_hub: bool = False,
        **kwargs: object,
    ) -> None:
        """Write adapters: "default" into the folder, others into subfolders of their names; no base weights.

        `from_pretrained` of transformers, with PEFT installed, loads base model and adapter from such a folder; so does
        `hra_fx.load_adapter` over the base model. To write a whole model, fold it first.

        Args:
            save_directory: the folder.
            is_main_process: only the main process writes.
            state_dict: the model's, where a wrapper has gathered it.
            selected_adapters: names; `None` for all.
            safe_serialization: must be true, for a pickle is never written.
            push_to_hub: must be false; call `model.push_to_hub(...)`.
            kwargs: what the base class knows besides (`max_shard_size`, `variant`), which has no meaning here.

        Raises:
            AdapterError: `safe_serialization=False` or `push_to_hub=True`, or there is no such adapter.
            CheckpointError: the adapter cannot be written.
        """
        options = {
            "state_dict": state_dict,
            "is_main_process": is_main_process,
            "safe_serialization": safe_serialization,
            "push_to_hub": push_to_hub,
        }
        save_as_it_is(self, save_directory, selected_adapters, options, kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does; reflections of the output layer stay, on the layer that then stands in its place.

        Their vectors are as long as a hidden state, so they are right for any number of tokens, and they are the very
        parameters that an optimizer holds already.

        Raises:
            AdapterError: the embeddings or the output layer have trained copies, or an adapter is merged into the
                output layer. The model is as it was.
        """
        base: Any = super()
        record = record_of(self)
        if record is None:  # a new object of this class
            return base.resize_token_embeddings(*args, **kwargs)
        with resizable(self, record):
            return base.resize_token_embeddings(*args, **kwargs)

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class does, which puts new layers in place of quantised ones.

        Raises:
            AdapterError: there are adapters, which the new layers would not have. The model is as it was.
        """
        if record_of(self) is not None:
            raise AdapterError(
                f"{type(self).__name__}: dequantize puts new layers in place of those that carry reflections. Save the "
                "adapter (hra_fx.save_adapter), dequantize a model without it, and load it there (hra_fx.load_adapter)."
            )
        base: Any = super()
        return base.dequantize(*args, **kwargs)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether a quantised model can be trained: by this sign, and that of PEFT's classes, the Trainer knows it."""
        quantised = record_of(self) is not None and getattr(self, "is_quantized", False)
        return bool(quantised or vars(self).get("_hf_peft_config_loaded", False))

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        """transformers sets it where it loads an adapter of PEFT."""
        vars(self)["_hf_peft_config_loaded"] = value

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """What `save_pretrained` does not write; transformers' Trainer misses these keys knowingly when it resumes."""
        if record_of(self) is None:  # a new object of this class
            return vars(self).get("_keys_to_ignore_on_save")
        return set(self.state_dict()) - set(adapter_entries(self))

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """transformers sets it in `__init__`."""
        vars(self)["_keys_to_ignore_on_save"] = value


def _fuse_unless_adapted(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.fuse_qkv_projections)
    def fuse_qkv_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if record_of(self) is not None:
            raise AdapterError(
                f"{type(self).__name__}: fuse_qkv_projections copies the weights of its projections into new layers, "
                "which would have no reflections. Fold the adapters first (hra_fx.fold)."
            )
        return base.fuse_qkv_projections(self, *args, **kwargs)

    return fuse_qkv_projections


def save_as_it_is(
    model: nn.Module,
    directory: str | os.PathLike[str],
    selected_adapters: Iterable[str] | None,
    options: Mapping[str, Any],
    others: Mapping[str, Any],
) -> None:
    """Save the adapters of a model; a new object of an adapted class has none, and saves itself as its own class does.

    Args:
        model: the model.
        directory: the folder.
        selected_adapters: names; `None` for all.
        options: for `hra_fx.checkpoint.saving.save_pretrained`.
        others: what only the base class knows.
    """
    if record_of(model) is not None:
        save_pretrained(model, directory, selected_adapters, **options)
        return
    defaults = {"state_dict": None, "is_main_process": True, "safe_serialization": True, "push_to_hub": False}
    given = {name: value for name, value in options.items() if value is not defaults[name]}
    base: Any = original_class(model)
    base.save_pretrained(model, directory, **given, **others)


def is_pretrained(model: nn.Module) -> bool:
    """Whether the class of a model knows `save_pretrained`."""
    return callable(getattr(original_class(model), "save_pretrained", None))
