"""The folder of an adapter: found or refused by name, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from torch import Tensor

from hra_fx.checkpoint.folder import WEIGHTS_NAME, find, write
from hra_fx.checkpoint.weights import read
from hra_fx.config import CONFIG_NAME, HRAConfig
from hra_fx.errors import CheckpointError

KEY = "base_model.model.0.hra_u"
CONFIG = HRAConfig(r=2, target_modules=["0"]).to_json_string()
BOTH = [CONFIG_NAME, WEIGHTS_NAME]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, seed: int = 0) -> Path:
    write(folder, CONFIG, {KEY: normal(6, 2, seed=seed)}, {})
    return folder


def picture(folder: Path) -> dict[str, bytes | None]:
    """Every path in a folder, hidden ones too, with what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(source: Any, subfolder: str | None = None, **hub: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        find(source, subfolder, **hub)
    return str(caught.value)


def unwritten(folder: Path, tensors: Mapping[str, Tensor], config: str = CONFIG, **metadata: str) -> str:
    """The message of a refusal to write, after a look that the folder is as it was."""
    before = picture(folder)
    with pytest.raises(CheckpointError) as caught:
        write(folder, config, tensors, metadata)
    assert picture(folder) == before
    return str(caught.value)


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
    assert refused(nowhere) == f"{nowhere}: there is no such folder. Give the folder of an adapter."
    for source in (str(nowhere), "a/b/c", "two words", "", "../nowhere", "x" * 5000):
        message = refused(source)
        assert message.startswith(f"{source}: there is no such folder, and it is no name of a repository on the Hub.")
        assert "Give a folder, or a name such as 'user/name'." in message


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / WEIGHTS_NAME
    for source in (file, str(file)):
        assert refused(source) == f"{file}: is a file. Give the folder that it is in."


@pytest.mark.parametrize("name", BOTH)
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (saved(tmp_path) / name).unlink()
    wanted = (
        "there is no such file. Give the folder that an adapter was saved in, by PEFT with safe_serialization=True."
    )
    assert refused(tmp_path) == f"{tmp_path / name}: {wanted}"
    (tmp_path / name).mkdir()
    assert refused(tmp_path) == f"{tmp_path / name}: {wanted}"


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    os.replace(saved(tmp_path) / WEIGHTS_NAME, tmp_path / "adapter_model.bin")
    way_out = "Open it with PEFT and save it again with safe_serialization=True."
    assert refused(tmp_path) == f"{tmp_path / 'adapter_model.bin'}: is a pickle, which is never read. {way_out}"


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        saved(tmp_path / name)
    (saved(tmp_path / "unfinished") / WEIGHTS_NAME).unlink()
    way_out = "Adapters are in its subfolders 'a', 'b': give subfolder=."
    assert refused(tmp_path) == f"{tmp_path / CONFIG_NAME}: there is no such file. {way_out}"
    assert refused(tmp_path, "other") == f"{tmp_path / 'other'}: there is no such folder. {way_out}"
    assert "subfolders 'deep/c': give subfolder=." in refused(tmp_path, "deep")
    for step in range(12):
        saved(tmp_path / f"step-{step:02}")
    assert "'step-06', 'step-07', ...: give subfolder=." in refused(tmp_path)


@pytest.mark.parametrize(
    "subfolder",
    ["..", "../other", "a/../../other", "a\\..\\..\\other", "/other", "//host/other", "\\other", "C:\\other"],
)
def test_a_subfolder_does_not_lead_out_of_the_folder(tmp_path: Path, subfolder: str) -> None:
    saved(tmp_path / "other")
    folder = saved(tmp_path / "mine")
    saved(folder / "a")
    assert refused(folder, subfolder).startswith(f"{folder}: the subfolder {subfolder!r} is not in the folder.")


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^sub_folder: is no option of loading\. There are subfolder, cache_dir, "):
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


def test_a_repository_without_an_adapter_is_refused(hub: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "repository" / WEIGHTS_NAME).unlink()
    message = refused("user/name", **hub)
    assert "models--user--name" in message
    assert f"{WEIGHTS_NAME}: there is no such file." in message


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
    with pytest.raises(CheckpointError, match="could not be fetched from the Hub") as caught:
        find(source, **{**hub, **options})
    assert reason in str(caught.value)
    assert str(caught.value).endswith("Check the name, the revision, the network, and that your token may read it.")
    assert type(caught.value.__cause__).__module__ == "huggingface_hub.errors"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path / "adapter")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    wanted = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert [stat.S_IMODE((tmp_path / "adapter" / name).stat().st_mode) for name in BOTH] == [wanted, wanted]


def test_a_second_save_replaces_the_first_and_leaves_the_same_configuration_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    config, weights = ((tmp_path / name).stat() for name in BOTH)
    with open(tmp_path / WEIGHTS_NAME, "rb") as opened:
        saved(tmp_path, seed=1)
        assert torch.equal(read(tmp_path / WEIGHTS_NAME)[0][KEY], normal(6, 2, seed=1))
        assert (tmp_path / CONFIG_NAME).stat() == config
        assert (tmp_path / WEIGHTS_NAME).stat().st_ino != weights.st_ino
        assert len(opened.read()) == weights.st_size, "who reads the old file goes on reading it"
    write(tmp_path, HRAConfig(r=2).to_json_string(), {KEY: normal(6, 2)}, {})
    assert HRAConfig.from_pretrained(tmp_path).target_modules is None
    assert sorted(os.listdir(tmp_path)) == BOTH


def test_a_link_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / WEIGHTS_NAME).symlink_to(blob)
    saved(tmp_path / "adapter")
    assert blob.read_bytes() == b"shared"
    assert find(tmp_path / "adapter")


def test_no_tensors_and_metadata_that_is_no_text_are_refused(tmp_path: Path) -> None:
    assert "there are no tensors to save" in unwritten(saved(tmp_path), {})
    assert "safetensors cannot hold this" in unwritten(tmp_path, {KEY: normal(6, 2)}, note="\ud800")


def test_a_file_in_place_of_the_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(CheckpointError, match=r"is a file\. Give a folder to save in"):
        saved(file)
    with pytest.raises(CheckpointError, match="could not be saved to"):
        saved(file / "adapter")
    assert file.read_text() == "kept"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("other_is_there", [True, False])
def test_a_rename_that_fails_is_taken_back(tmp_path: Path, name: str, other_is_there: bool) -> None:
    saved(tmp_path)
    (other,) = set(BOTH) - {name}
    (tmp_path / name).unlink()
    (tmp_path / name / "inside").mkdir(parents=True)
    if not other_is_there:
        (tmp_path / other).unlink()
    message = unwritten(tmp_path, {KEY: normal(6, 2, seed=1)}, HRAConfig(r=4).to_json_string())
    assert message.startswith(f"{tmp_path}: could not be saved to (")
    assert "What was there is unchanged" in message


SAVING = """
import resource, sys, torch
from hra_fx.checkpoint.folder import write
from hra_fx.errors import CheckpointError
folder, mode, config = sys.argv[1:]
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write(folder, config + " ", {"hra_u": torch.ones(100, 100)}, {})
    except CheckpointError as error:
        print(error)
for number in range(10**9 if mode == "on" else 0):
    write(folder, config + " " * (number % 2), {"hra_u": torch.full((500, 200), float(number))}, {})
    if number == 3:
        print("saving", flush=True)
"""


def saving(folder: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVING, str(folder), mode, CONFIG]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_disk_that_is_full_leaves_the_old_adapter(tmp_path: Path) -> None:
    before = picture(saved(tmp_path))
    out, err = saving(tmp_path, "full").communicate(timeout=60)
    assert f"{tmp_path}: could not be saved to ([Errno 27] File too large)" in out, err
    assert picture(tmp_path) == before


def whole(folder: Path) -> float:
    """The number that the adapter in `folder` was saved with, which all its values are."""
    HRAConfig.from_pretrained(find(folder))
    values = read(folder / WEIGHTS_NAME)[0]["hra_u"].unique()
    assert values.numel() == 1
    return float(values)


def test_who_reads_while_another_saves_and_is_killed_finds_a_whole_adapter(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(3):
        process = saving(tmp_path, "on")
        assert process.stdout.readline() == "saving\n"
        until = time.monotonic() + draw.uniform(0.05, 0.3)
        seen = {whole(tmp_path)}
        while time.monotonic() < until:
            seen.add(whole(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert len(seen) > 1
        assert whole(tmp_path) >= max(seen)


def interrupted(folder: Path, step: int) -> bool:
    """Whether a save of an r of 4 ended before its `step`-th opcode between the files, where Ctrl-C arrives."""
    left = [step]

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name != "_put":
            return None
        frame.f_trace_opcodes = True
        left[0] -= event == "opcode"
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        write(folder, HRAConfig(r=4).to_json_string(), {KEY: normal(6, 4)}, {})
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


@pytest.mark.parametrize("first", [True, False])
def test_an_interrupt_at_any_place_leaves_the_old_adapter_or_the_new_one(tmp_path: Path, first: bool) -> None:
    old = {} if first else picture(saved(tmp_path / "old"))
    assert not interrupted(tmp_path / "new", -1)
    new = picture(tmp_path / "new")
    outcomes = []
    while True:
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        if not first:
            saved(folder)
        if not interrupted(folder, len(outcomes) + 1):
            break
        outcomes.append(picture(folder))
    assert all(outcome in (old, new) for outcome in outcomes)
    assert outcomes[0] == old
    assert outcomes[-1] == new
