"""A server on this machine that answers as the Hugging Face Hub does, and an API that takes uploads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id


class Answering(BaseHTTPRequestHandler):
    """What all servers of these tests do."""

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing: the output of the tests stays readable."""


@contextmanager
def serving(kind: type[Answering], **attributes: object) -> Iterator[str]:
    """A block in which a server of this kind answers: its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (kind,), attributes))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def one_hub() -> Iterator[dict[str, bytes]]:
    """A block in which the API of the Hub has one repository, `user/name`: its files."""
    held: dict[str, bytes] = {}

    def create_repo(api: object, repo_id: str, **options: object) -> SimpleNamespace:
        validate_repo_id(repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(
        api: object, *, repo_id: str, folder_path: str, ignore_patterns: list[str] | None, **options: object
    ) -> str:
        assert repo_id == "user/name"
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        names = {file.relative_to(folder_path).as_posix(): file for file in files}
        held.update((name, file.read_bytes()) for name, file in names.items() if name not in (ignore_patterns or []))
        return f"https://hub/{repo_id}/commit/1"

    def file_exists(api: object, repo_id: str, filename: str, **options: object) -> bool:
        return filename in held

    with pytest.MonkeyPatch.context() as patch:
        for own in (create_repo, upload_folder, file_exists):
            method = create_autospec(getattr(HfApi, own.__name__), side_effect=own)  # takes the arguments of the real
            patch.setattr(HfApi, own.__name__, method)
        yield held
