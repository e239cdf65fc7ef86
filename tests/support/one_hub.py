"""A server on this machine that takes uploads as the Hugging Face Hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest


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


class Hub(Answering):
    """One repository, whose files are kept in `files`."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        known = self.path.startswith("/user/name/resolve/main/") and self.path.rpartition("/")[2] in self.files
        headers = {"ETag": '"1"', "X-Repo-Commit": "1"} if known else {"X-Error-Code": "EntryNotFound"}
        self.answer(200 if known else 404, b"", headers)

    def do_GET(self) -> None:
        self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer_json({"commitUrl": f"{self.repository}/commit/1", "commitOid": "1"})
        else:
            self.answer_json({"url": self.repository, "id": "user/name", "name": "user/name"})

    @property
    def repository(self) -> str:
        return f"http://{self.headers['Host']}/user/name"

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode())


@contextmanager
def one_hub() -> Iterator[dict[str, bytes]]:
    """A block in which a Hub has one repository, `user/name`: its files."""
    held: dict[str, bytes] = {}
    constants = huggingface_hub.constants
    with serving(Hub, files=held) as address, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield held
