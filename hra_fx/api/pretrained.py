"""Methods of transformers and diffusers models that would lose adapters: saving, uploading, resizing, dequantizing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from hra_fx.checkpoint.card import CARD_NAME, create_or_update_model_card as create_or_update_model_card
from hra_fx.checkpoint.folder import PREFIX, adapter_entries
from hra_fx.checkpoint.saving import save_adapters
from hra_fx.errors import AdapterError
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.sharding import on_first_rank
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.root import AdaptedModel


def save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    selected_adapters: Iterable[str] | None = None,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | str = "auto",
    push_to_hub: bool = False,
    **ignored: object,
) -> None:
    """Write adapters, without base weights: "default" into the folder, others into subfolders with their names.

    Load them into the base model with `hra_fx.load_adapter`, or, if PEFT is installed, with `from_pretrained` of
    transformers. To write a whole model, fold it first. Other options of the libraries are ignored: files are never
    pickled (`safe_serialization`).

    Raises:
        AdapterError: the model has no such adapter; or an option asks for what is not supported: a copy of the
            embeddings (`save_embedding_layers=True`), or an upload.
        CheckpointError: the adapter cannot be written.
    """
    if save_embedding_layers is True:
        raise AdapterError("save_embedding_layers=True is not supported: name the embeddings in modules_to_save.")
    if push_to_hub:
        raise AdapterError("push_to_hub=True was removed in 0.5. Call hra_fx.push_to_hub(model, repo_id).")
    save_adapters(self, save_directory, selected_adapters, state_dict, is_main_process=is_main_process)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    selected_adapters: Iterable[str] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> str:
    """Upload adapters, with a model card if the repository does not have one. The repository is created if needed.

    With `fully_shard`, all processes must call this function, and the first process uploads.

    Args:
        model: a transformed model.
        repo_id: name of the repository, such as `"user/name"`.
        selected_adapters: names of adapters; `None` for all.
        private, token, revision: as in huggingface_hub.
        commit: options of `huggingface_hub.upload_folder`, such as `commit_message` and `create_pr`.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError, CheckpointError: see `model.save_pretrained`; nothing is uploaded.
        HfHubHTTPError: the upload failed.
    """
    from huggingface_hub import HfApi

    def upload() -> str:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = [CARD_NAME] if api.file_exists(repository, CARD_NAME, revision=revision) else None
        options: Any = {"revision": revision, "commit_message": "Upload HRA adapter", **commit}
        return str(api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept, **options))

    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, folder, selected_adapters)
        return on_first_rank(model.parameters(), upload)


def _refused(
    name: str, effect: str = "would replace adapted layers, which would lose their adapters."
) -> Callable[..., NoReturn]:
    """A method that raises an error, because that of the base class replaces layers or knows PEFT's adapters only."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(
            f"{type(self).__name__}: {name} {effect} Call it before hra_fx.transform or hra_fx.load_adapter, or after "
            "hra_fx.fold."
        )

    return method


class AdaptedPretrainedModel(AdaptedModel):
    """A transformed model whose `save_pretrained` writes only its adapters, as transformers does for PEFT.

    The base class would write base weights and vectors into one file, and ignore the vectors when it loads the file.
    """

    # transformers' Trainer calls it when it writes its model card.
    create_or_update_model_card = create_or_update_model_card
    push_to_hub = push_to_hub
    save_pretrained = save_pretrained
    dequantize = _refused("dequantize")
    fuse_qkv_projections = _refused("fuse_qkv_projections")
    resize_token_embeddings = _refused("resize_token_embeddings")
    delete_adapters = _refused("delete_adapters", "would do nothing: use hra_fx.delete_adapter.")
    set_adapters = _refused("set_adapters", "would do nothing: use hra_fx.set_adapter and hra_fx.set_scale.")

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing while adapters have trained copies: the base class would overwrite those of tied weights."""
        tie = getattr(super(), "tie_weights", None)  # diffusers has none
        if tie and not all_copies(self):
            tie(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, without the entries with which a checkpoint stops PEFT (see `save_adapters`)."""
        own = {key: one for key, one in state_dict.items() if not key.startswith(PREFIX) or one.numel()}
        return super().load_state_dict(own, *args, **kwargs)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """True for a quantized model with adapters, so that the Trainer accepts it as trainable."""
        return bool(getattr(self, "is_quantized", False) or vars(self).get("_hf_peft_config_loaded", False))

    @_hf_peft_config_loaded.setter
    def _hf_peft_config_loaded(self, value: bool) -> None:
        """Set by transformers when it loads a PEFT adapter."""
        vars(self)["_hf_peft_config_loaded"] = value

    @property
    def _keys_to_ignore_on_save(self) -> Any:
        """Keys that `save_pretrained` does not write. The Trainer allows them to be missing when it resumes."""
        return set(self.state_dict()) - set(adapter_entries(self))


def root_class_for(model: nn.Module) -> type[AdaptedModel]:
    """The class that is mixed into a model. For models with `save_pretrained`, it replaces more methods."""
    pretrained = callable(getattr(original_class(model), "save_pretrained", None))
    return AdaptedPretrainedModel if pretrained else AdaptedModel
