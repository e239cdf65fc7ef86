"""Methods of transformers and diffusers models that must not lose adapters: saving, resizing, dequantizing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.keys import adapter_entries
from hra_fx.checkpoint.saving import save_pretrained
from hra_fx.errors import AdapterError
from hra_fx.integrations import push
from hra_fx.integrations.resize_embeddings import plain_output_layers
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.sharding import is_dtensor, on_first_rank
from hra_fx.model.root import AdaptedModel
from hra_fx.model.state import names_in, root_of


class AdaptedPretrainedModel(AdaptedModel):
    """A transformed model with `save_pretrained`, which writes its adapters only, as transformers does for PEFT.

    The base class would write base weights and vectors into one file, and drop the vectors when it loads it.
    """

    # transformers' Trainer calls it when it writes its own.
    create_or_update_model_card = push.create_or_update_model_card
    push_to_hub = push.push_to_hub

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace `fuse_qkv_projections` of diffusers, where the class has it."""
        methods = super().wrap(base)
        if hasattr(base, "fuse_qkv_projections"):
            methods["fuse_qkv_projections"] = _refuse_to_fuse
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
        """Write adapters, without base weights: "default" into the folder, others into subfolders with their names.

        Load them into the base model with `hra_fx.load_adapter`, or, if PEFT is installed, with `from_pretrained` of
        transformers. To write a whole model, fold it first.

        Args:
            save_directory: the folder.
            is_main_process: only the main process writes.
            state_dict: the model's state, if a wrapper has gathered it.
            selected_adapters: names; `None` for all.
            safe_serialization: must be true, because pickle files are never written.
            push_to_hub: also upload the files to the repository `repo_id`, by default one with the name of the folder.
            kwargs: `repo_id` and options of `push_to_hub`, such as `token` and `private`; other options of the base
                class (`max_shard_size`, `variant`) are ignored.

        Raises:
            AdapterError: `safe_serialization` is False, or the adapter does not exist.
            CheckpointError: the adapter cannot be written.
        """
        saving: Any = {"state_dict": state_dict, "safe_serialization": safe_serialization}
        save_adapters(self, save_directory, selected_adapters, is_main_process, push_to_hub, saving, kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize as the base class does; the resized output layer keeps its reflections.

        Its vectors are as long as a hidden state, so they fit any number of tokens. They remain the same parameters, so
        an optimizer that holds them keeps working.

        Raises:
            AdapterError: the embeddings or the output layer have trained copies, or an adapter is merged into the
                output layer. The model is unchanged.
        """
        base: Any = super()
        with plain_output_layers(self):
            return base.resize_token_embeddings(*args, **kwargs)

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """The base class would replace quantized layers.

        Raises:
            AdapterError: always; the new layers would have no adapters. The model is unchanged.
        """
        raise AdapterError(
            f"{type(self).__name__}: dequantize replaces the adapted layers, so they would lose their reflections. "
            "Save the adapter (hra_fx.save_adapter), dequantize a model without it, and load it there "
            "(hra_fx.load_adapter)."
        )

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """True for a quantized model with adapters, so that the Trainer accepts it as trainable."""
        return bool(getattr(self, "is_quantized", False) or vars(self).get("_hf_peft_config_loaded", False))

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        """transformers sets it when it loads a PEFT adapter."""
        vars(self)["_hf_peft_config_loaded"] = value

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """Keys that `save_pretrained` does not write; the Trainer accepts that they are missing when it resumes."""
        return set(self.state_dict()) - set(adapter_entries(self))

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """transformers sets it in `post_init`; it has no effect while the model has adapters."""
        vars(self)["_keys_to_ignore_on_save"] = value


def _refuse_to_fuse(self: nn.Module) -> None:
    raise AdapterError(
        f"{type(self).__name__}: fuse_qkv_projections copies weights into new layers, which would have no reflections. "
        "Fold the adapters first (hra_fx.fold)."
    )


def save_adapters(
    model: nn.Module,
    directory: str | os.PathLike[str],
    selected_adapters: Iterable[str] | None,
    is_main_process: bool,
    push_to_hub: bool,
    saving: Mapping[str, Any],
    upload: Mapping[str, Any],
) -> None:
    """Save adapters (`None` for all), and upload them if asked to, with the options of `push_to_hub` in `upload`."""
    save_pretrained(model, directory, selected_adapters, is_main_process=is_main_process, **saving)
    shards = [p for p in model.parameters() if is_dtensor(p)] if saving["state_dict"] is None else []
    if push_to_hub and (is_main_process or shards):
        state = root_of(model)[1]
        names = names_in(state, state.configs if selected_adapters is None else selected_adapters)
        repository = upload.get("repo_id", Path(directory).name)
        on_first_rank(shards, lambda: push.upload(Path(directory), repository, names, upload))


def root_class_for(model: nn.Module) -> type[AdaptedModel]:
    """The class that is mixed into a model: models with `save_pretrained` need more methods replaced."""
    pretrained = callable(getattr(original_class(model), "save_pretrained", None))
    return AdaptedPretrainedModel if pretrained else AdaptedModel
