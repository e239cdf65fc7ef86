"""Upload adapters to the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

from torch import nn

from hra_fx.checkpoint.saving import CARD_NAME, save_adapters
from hra_fx.layers.sharding import on_first_rank

_COMMIT = ("commit_message", "commit_description", "revision", "create_pr")


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
