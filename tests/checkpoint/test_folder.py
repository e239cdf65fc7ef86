"""The folder of an adapter: found, or refused by name."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from checkpoint.folders import BOTH, KEY, normal, picture, refused, saved

from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, read
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError, ConfigError


def test_a_local_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "mine")
    saved(tmp_path / "mine" / "adapters" / "first")
    monkeypatch.chdir(tmp_path)
    assert find("mine") == Path("mine")
    assert find(tmp_path / "mine") == find(str(tmp_path / "mine")) == tmp_path / "mine"
    assert find("mine", "") == find("mine", ".") == Path("mine")
    for subfolder in ("adapters/first", "adapters/first/", "./adapters//first", "adapters/other/../first"):
        assert find("mine", subfolder) == Path("mine/adapters/first")


def test_the_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    real = saved(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in BOTH:
        (linked / name).symlink_to(real / name)
    assert find(linked) == linked


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(nowhere) == f"{nowhere}: no such folder. Pass the folder of an adapter."
    for source in (str(nowhere), "a/b/c", "two words", "", "../nowhere", "x" * 5000):
        message = refused(source)
        assert message.startswith(f"{source}: no such folder, and not a valid Hub repository name.")
        assert "Pass a folder, or a name such as 'user/name'." in message


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / WEIGHTS_NAME
    for source in (file, str(file)):
        assert refused(source) == f"{file}: is a file. Pass the folder that contains it."


@pytest.mark.parametrize("name", BOTH)
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).unlink()
    wanted = "no such file. Pass the folder that an adapter was saved in (in PEFT, with safe_serialization=True)."
    assert refused(tmp_path) == f"{tmp_path / name}: {wanted}"
    (tmp_path / name).mkdir()
    assert refused(tmp_path) == f"{tmp_path / name}: {wanted}"


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    os.replace(saved(tmp_path) / WEIGHTS_NAME, tmp_path / "adapter_model.bin")
    assert refused(tmp_path) == (
        f"{tmp_path / 'adapter_model.bin'}: pickle files are never read. Load the adapter with PEFT and save it again "
        "with safe_serialization=True."
    )


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        saved(tmp_path / name)
    (saved(tmp_path / "unfinished") / WEIGHTS_NAME).unlink()
    suggestion = "There are adapters in the subfolders 'a', 'b': pass the path of one of them."
    assert refused(tmp_path) == f"{tmp_path / CONFIG_NAME}: no such file. {suggestion}"
    assert refused(tmp_path, "other") == f"{tmp_path / 'other'}: no such folder. {suggestion}"
    assert "subfolders 'deep/c': pass the path of one of them." in refused(tmp_path, "deep")


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'sub_folder'\. Use subfolder, cache_dir, "):
        find(saved(tmp_path), sub_folder="a")


# Found on the Hub: a server on this machine that answers as the Hub does

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The repository `user/name` with a folder as its content, and `user/gated`, which may not be read."""

    root: Path

    def do_GET(self) -> None:
        head, _, path = self.path.partition(f"/{COMMIT}")
        path = unquote(path.split("?")[0].lstrip("/"))
        if "gated" in head:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif head == "/api/models/user/name/revision/main":
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

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing: the output of the tests stays readable."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options of `find` that lead to a Hub whose `user/name` holds an adapter, one in "other [1]", and a README."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    root = saved(tmp_path / "repository", seed=1)
    saved(root / "other [1]", seed=2)
    (root / "README.md").write_text("A model card.")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path / "cache", "token": False}
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_is_fetched_and_only_the_two_files_of_it(hub: dict[str, Any]) -> None:
    folder = find("user/name", **hub)
    assert sorted(picture(folder)) == BOTH
    assert torch.equal(read(folder / WEIGHTS_NAME)[0][KEY], normal(6, 2, seed=1))
    assert find("user/name", cache_dir=hub["cache_dir"], local_files_only=True) == folder


def test_a_subfolder_of_a_repository_is_fetched(hub: dict[str, Any]) -> None:
    folder = find("user/name", "other [1]", **hub)
    assert sorted(picture(folder.parent)) == ["other [1]", *(f"other [1]/{name}" for name in BOTH)]
    assert torch.equal(read(folder / WEIGHTS_NAME)[0][KEY], normal(6, 2, seed=2))


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ("user/nobody", {}, "Repository Not Found"),
        ("user/gated", {}, "Cannot access gated repo"),
        ("user/name", {"revision": "v9"}, "Revision Not Found"),
        ("user/name", {"local_files_only": True}, "outgoing traffic has been disabled"),
        ("user/name", {"endpoint": "http://127.0.0.1:9"}, "ConnectError"),
    ],
)
def test_errors_of_the_hub_are_refusals(hub: dict[str, Any], source: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match="the download from the Hub failed") as caught:
        find(source, **{**hub, **options})
    assert reason in str(caught.value)
    assert str(caught.value).endswith(
        "Check the name, the revision, the network, and that your token may read the repository."
    )
    assert type(caught.value.__cause__).__module__ == "huggingface_hub.errors"


def test_a_configuration_is_fetched_alone(hub: dict[str, Any], tmp_path: Path) -> None:
    wanted = HRAConfig.from_pretrained(tmp_path / "repository")
    assert HRAConfig.from_pretrained("user/name", **hub) == wanted
    assert HRAConfig.from_pretrained("user/name", "other [1]", **hub) == wanted
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_symlink() or path.is_file())
    assert CONFIG_NAME in cached and WEIGHTS_NAME not in cached
    for source, options, text in (
        ("user/nobody", hub, "^user/nobody: no such folder, and the download from the Hub failed"),
        ("a/b/c", {}, "^a/b/c: no such folder, and not a valid Hub repository name"),
    ):
        with pytest.raises(ConfigError, match=text):
            HRAConfig.from_pretrained(source, **options)
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'sub_folder'\. Use subfolder, cache_dir, "):
        HRAConfig.from_pretrained("user/name", sub_folder="a")
