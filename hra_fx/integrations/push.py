"""`push_to_hub`: upload the adapters of a model to a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from hra_fx.checkpoint.model_card import CARD_NAME, write_card
from hra_fx.checkpoint.saving import save_pretrained
from hra_fx.model.state import root_of


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str = "Upload HRA adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    selected_adapters: Iterable[str] | None = None,
    **ignored: Any,
) -> str:
    """Upload adapters, with a model card if the repository has none. The repository is created if needed.

    Args:
        model: a transformed model.
        repo_id: name of the repository, such as `"user/name"`.
        commit_message, commit_description, revision, create_pr: of the commit.
        private: whether a new repository is private.
        token: token of the Hub; `None` for the stored one.
        selected_adapters: names; `None` for all.
        ignored: other options of `push_to_hub` of transformers and diffusers.

    Returns:
        The URL of the commit.

    Raises:
        AdapterError, CheckpointError: as `model.save_pretrained`; nothing is uploaded.
        HfHubHTTPError: the upload failed.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, selected_adapters)
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repository, CARD_NAME, revision=revision):
            os.remove(os.path.join(folder, CARD_NAME))
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit)


def create_or_update_model_card(model: nn.Module, output_dir: str | os.PathLike[str]) -> None:
    """Write the model card of all adapters, or update the metadata of the one in the folder.

    Args:
        model: a transformed model.
        output_dir: the folder.

    Raises:
        AdapterError: the model has no adapters.
        CheckpointError: the file cannot be written.
    """
    root, record = root_of(model)
    write_card(Path(output_dir), root, record.configs)
