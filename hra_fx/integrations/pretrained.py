"""Methods of transformers and diffusers models that would lose adapters: saving, uploading, resizing, dequantizing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hra_fx.checkpoint.folder import PREFIX, adapter_entries
from hra_fx.checkpoint.saving import CARD_NAME, save_adapters, write_card
from hra_fx.errors import AdapterError
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.sharding import on_first_rank
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.root import AdaptedModel
from hra_fx.model.state import root_of

#: Options of `HfApi.upload_folder`.
_COMMIT = ("commit_message", "commit_description", "revision", "create_pr")


def save_pretrained(
    self: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    selected_adapters: Iterable[str] | None = None,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
    save_embedding_layers: bool | str = "auto",
    push_to_hub: bool = False,
    **ignored: object,
) -> None:
    """Write adapters, without base weights: "default" into the folder, others into subfolders with their names.

    Load them into the base model with `hra_fx.load_adapter`, or, if PEFT is installed, with `from_pretrained` of
    transformers. To write a whole model, fold it first. Other options of the libraries are ignored.

    Raises:
        AdapterError: the model has no such adapter; or an option asks for what is not supported: pickle files
            (`safe_serialization=False`), a copy of the embeddings (`save_embedding_layers=True`), or an upload.
        CheckpointError: the adapter cannot be written.
    """
    if not safe_serialization:
        raise AdapterError("safe_serialization must be True, got False: pickle files are never written.")
    if save_embedding_layers is True:
        raise AdapterError("save_embedding_layers=True is not supported: name the embeddings in modules_to_save.")
    if push_to_hub:
        raise AdapterError("push_to_hub=True was removed in 0.5. Call hra_fx.push_to_hub(model, repo_id).")
    save_adapters(self, save_directory, selected_adapters, state_dict, is_main_process=is_main_process)


def create_or_update_model_card(model: nn.Module, output_dir: str | os.PathLike[str]) -> None:
    """Write the model card of all adapters, or update the metadata of the model card in the folder."""
    root, state = root_of(model)
    write_card(Path(output_dir), root, state.configs)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    selected_adapters: Iterable[str] | None = None,
    **options: Any,
) -> str:
    """Upload adapters, with a model card if the repository does not have one. The repository is created if needed.

    With `fully_shard`, all processes must call this function, and the first process uploads.

    Args:
        model: a transformed model.
        repo_id: name of the repository, such as `"user/name"`.
        selected_adapters: names of adapters; `None` for all.
        options: `private`, `token`, `revision`, `commit_message`, `commit_description` and `create_pr`, as in
            huggingface_hub. Other options of `push_to_hub` in transformers and diffusers are ignored.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError, CheckpointError: see `model.save_pretrained`; nothing is uploaded.
        HfHubHTTPError: the upload failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(model, folder, selected_adapters)
        return on_first_rank(model.parameters(), lambda: _upload(folder, repo_id, options))


def _upload(folder: str, repo_id: str, options: dict[str, Any]) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    repository = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    has_card = api.file_exists(repository, CARD_NAME, revision=options.get("revision"))
    commit = {name: value for name, value in options.items() if name in _COMMIT}
    url = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        ignore_patterns=[CARD_NAME] if has_card else None,
        **{"commit_message": "Upload HRA adapter", **commit},
    )
    return str(url)


class AdaptedPretrainedModel(AdaptedModel):
    """A transformed model whose `save_pretrained` writes only its adapters, as transformers does for PEFT.

    The base class would write base weights and vectors into one file, and ignore the vectors when it loads the file.
    """

    # transformers' Trainer calls it when it writes its model card.
    create_or_update_model_card = create_or_update_model_card
    push_to_hub = push_to_hub
    save_pretrained = save_pretrained

    @classmethod
    def wrap(cls, base: type[nn.Module]) -> dict[str, Any]:
        """Replace diffusers' `fuse_qkv_projections` and transformers' `tie_weights`, if the class has them."""
        methods = super().wrap(base)
        if hasattr(base, "fuse_qkv_projections"):
            methods["fuse_qkv_projections"] = _refuse_to_fuse
        if hasattr(base, "tie_weights"):
            methods["tie_weights"] = _tie_weights
        return methods

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state, without the entries with which a checkpoint stops PEFT (see `save_adapters`)."""
        own = {key: one for key, one in state_dict.items() if not key.startswith(PREFIX) or one.numel()}
        return super().load_state_dict(own, *args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error, because the base class would replace layers with reflections and trained copies."""
        raise AdapterError(
            f"{type(self).__name__}: resize_token_embeddings could lose adapters and trained copies. Resize before "
            "hra_fx.transform, or fold first."
        )

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error, because the base class would replace the adapted layers."""
        raise AdapterError(
            f"{type(self).__name__}: dequantize replaces the adapted layers, so they would lose their reflections. "
            "Save the adapter (hra_fx.save_adapter), and load it (hra_fx.load_adapter) into a dequantized model."
        )

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

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, value: Any) -> None:
        """Set by transformers in `post_init`; it has no effect while the model has adapters."""
        vars(self)["_keys_to_ignore_on_save"] = value


def _tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
    """Do nothing while adapters have trained copies, because the base class would overwrite those of tied weights."""
    base: Any = original_class(self)
    if not all_copies(self):
        base.tie_weights(self, *args, **kwargs)


def _refuse_to_fuse(self: nn.Module) -> None:
    raise AdapterError(
        f"{type(self).__name__}: fuse_qkv_projections copies weights into new layers, which would have no reflections. "
        "Fold the adapters first (hra_fx.fold)."
    )


def root_class_for(model: nn.Module) -> type[AdaptedModel]:
    """The class that is mixed into a model. For models with `save_pretrained`, it replaces more methods."""
    pretrained = callable(getattr(original_class(model), "save_pretrained", None))
    return AdaptedPretrainedModel if pretrained else AdaptedModel
