"""Folders of adapters: how they are found locally and on the Hub, and written completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from adapting import mlp
from checkpoint.damaging import CONFIG_NAME, WEIGHTS_NAME, saved
from checkpoints import files_of_at_most, picture
from model.many import bert, config, ids, run, turn
from one_hub import Answering, serving
from oracles import relative_error

import hra_fx
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError

BOTH = [CONFIG_NAME, WEIGHTS_NAME]


def adapter(folder: Path, r: int = 2) -> Path:
    return saved(folder, "0", r=r)


def rank_of(source: Any, subfolder: str | None = None, **hub: Any) -> int:
    """The rank of the adapter that is loaded."""
    return hra_fx.report(hra_fx.load_adapter(mlp(), source, subfolder=subfolder, **hub)).rows[0].r


def refused(source: Any, subfolder: str | None = None, **hub: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        rank_of(source, subfolder, **hub)
    return str(caught.value)


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "mine")
    adapter(tmp_path / "mine" / "adapters" / "first", r=4)
    monkeypatch.chdir(tmp_path)
    assert [rank_of(source) for source in ("mine", tmp_path / "mine", str(tmp_path / "mine"))] == [2, 2, 2]
    assert [rank_of("mine", subfolder) for subfolder in ("", ".")] == [2, 2]
    assert rank_of("mine", "adapters/first") == 4
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'sub_folder'\. Use subfolder, repo_type, "):
        rank_of("mine", sub_folder="a")


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(nowhere) == f"{nowhere}: no such folder. Pass the folder of an adapter."
    for source in (str(nowhere), "a/b/c", "two words", "", "../nowhere", "x" * 5000):
        message = refused(source)
        assert message.startswith(f"{source}: no such folder, and the download from the Hub failed (")
        assert "Check the name, the revision, the network" in message
    file = adapter(tmp_path) / WEIGHTS_NAME
    assert refused(file) == f"{file}: no such folder. Pass the folder of an adapter."


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c", "unfinished"):
        adapter(tmp_path / name)
    (tmp_path / "unfinished" / WEIGHTS_NAME).unlink()
    suggestion = "There are adapters in the subfolders 'a', 'b': pass the path of one of them."
    assert refused(tmp_path) == f"{tmp_path / CONFIG_NAME}: no such file. {suggestion}"
    assert refused(tmp_path, "other") == f"{tmp_path / 'other' / CONFIG_NAME}: no such file. {suggestion}"
    assert "subfolders 'deep/c': pass the path of one of them." in refused(tmp_path, "deep")


# ---- found on the Hub: a local server answers like the Hub ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Answering):
    """The repository `user/name` with a folder as its content."""

    root: Path

    def do_GET(self) -> None:
        head, _, path = self.path.partition(f"/{COMMIT}")
        path = unquote(path.split("?")[0].lstrip("/"))
        if head == "/api/models/user/name/revision/main":
            self.answer(200, json.dumps({"id": "user/name", "sha": COMMIT, "siblings": []}).encode())
        elif head == "/api/models/user/name/tree":
            self.answer(200, json.dumps([self.entry(p) for p in self.root.rglob("*") if p.is_file()]).encode())
        elif head == "/user/name/resolve":
            etag = self.entry(self.root / path)["oid"]
            self.answer(200, (self.root / path).read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound" if "user/name" in head else "RepoNotFound"})

    do_HEAD = do_GET

    def entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.root).as_posix()
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": name.encode().hex()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options for a server whose `user/name` has an adapter, another one in "other [1]", and a README."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    root = adapter(tmp_path / "repository")
    adapter(root / "other [1]", r=4)
    (root / "README.md").write_text("A model card.")
    with serving(Hub, root=root) as address:
        yield {"endpoint": address, "cache_dir": tmp_path / "cache", "token": False}


def test_only_the_two_files_of_a_repository_are_downloaded(hub: dict[str, Any]) -> None:
    assert rank_of("user/name", **hub) == 2
    assert sorted({file.name for file in hub["cache_dir"].rglob("*.*") if file.is_symlink()}) == BOTH
    assert rank_of("user/name", cache_dir=hub["cache_dir"], local_files_only=True) == 2
    assert rank_of("user/name", "other [1]", **hub) == 4


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("user/nobody", {}, "Repository Not Found"),
        ("user/name", {"revision": "v9"}, "Revision Not Found"),
        ("user/name", {"endpoint": "http://127.0.0.1:9"}, "ConnectError"),
    ],
)
def test_errors_of_the_hub(hub: dict[str, Any], source: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match="the download from the Hub failed") as caught:
        rank_of(source, **{**hub, **options})
    assert reason in str(caught.value)
    assert str(caught.value).endswith(
        "Check the name, the revision, the network, and that your token may read the repository."
    )
    assert type(caught.value.__cause__).__module__ == "huggingface_hub.errors"


def test_a_configuration_is_downloaded_without_weights(hub: dict[str, Any], tmp_path: Path) -> None:
    wanted = HRAConfig.from_pretrained(tmp_path / "repository")
    assert HRAConfig.from_pretrained("user/name", **hub) == wanted
    assert HRAConfig.from_pretrained("user/name", "other [1]", **hub).r == 4
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file())
    assert CONFIG_NAME in cached and WEIGHTS_NAME not in cached
    with pytest.raises(CheckpointError, match=r"^user/nobody: no such folder, and the download from the Hub failed"):
        HRAConfig.from_pretrained("user/nobody", **hub)


# ---- written and read ----


def test_files_that_killed_processes_left_are_removed_after_a_day(tmp_path: Path) -> None:
    """Not newer ones, which another process may be writing, and not those of other files."""
    names = [f".{BOTH[1]}.old.tmp", f".{BOTH[1]}.new.tmp", ".other.old.tmp"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0) if "old" in name else None)
    adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], *BOTH])


@pytest.mark.parametrize("save", [hra_fx.save_adapter, hra_fx.save_as_lora, hra_fx.HRAModel.save_pretrained])
def test_an_empty_path_is_refused(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = hra_fx.transform(mlp(), config("0"))
    with pytest.raises(CheckpointError, match=r"^the path of the folder is empty \(''\)\. Pass the folder to write"):
        save(model, "")
    assert not [*tmp_path.iterdir()]


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for folder in (file, file / "adapter"):
        with pytest.raises(CheckpointError, match="cannot write the adapter"):
            adapter(folder)
    assert file.read_text() == "kept"


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    before = picture(adapter(tmp_path))
    message = rf"^{tmp_path}: cannot write the adapter \(\[Errno 27\] File too large\)"
    with files_of_at_most(500), pytest.raises(CheckpointError, match=message):
        saved(tmp_path, "0", "3", r=6)
    assert picture(tmp_path) == before


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """safetensors itself writes metadata in a random order."""
    for i in range(5):
        adapter(tmp_path / str(i), r=3)
    assert len({(tmp_path / str(i) / WEIGHTS_NAME).read_bytes() for i in range(5)}) == 1


def test_a_full_model_in_a_checkpoint_folder_is_unchanged(tmp_path: Path) -> None:
    """In the Trainer's checkpoints, model.safetensors has the state of the adapters. Here it has a full model."""
    model = hra_fx.transform(bert(), config("query", "value"))
    turn(model)
    folder = tmp_path / "checkpoint-3"
    bert().save_pretrained(folder)
    before = picture(folder)
    model.save_pretrained(folder)
    after = picture(folder)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == ["README.md", *BOTH, "config.json", "model.safetensors"]
    opened = hra_fx.load_adapter(bert(), folder)
    assert relative_error(run(opened, ids()), run(model, ids())) < 1e-13
