"""The model card: its metadata, its code, which runs, and that it never replaces what somebody wrote."""

from __future__ import annotations

import base64
import json
import re
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from integrations.transformers_use.tiny import adapted, batch, llama, trainer_of, turn
from oracles import relative_error
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

import hra_fx
from hra_fx.checkpoint.model_card import PLACE


def saved(folder: Path, base: str = "base", **fields: Any) -> Any:
    """A language model over the base model of a folder; its adapter is in "adapter"."""
    llama().save_pretrained(folder / base)
    model = adapted("llama", "HRAModel", base=LlamaForCausalLM.from_pretrained(folder / base), **fields)
    turn(model)
    model.save_pretrained(folder / "adapter")
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=batch("llama")["input_ids"]).logits
    return out


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path)
    text = (tmp_path / "adapter" / "README.md").read_text().replace(PLACE, str(tmp_path / "adapter"))
    load, by_peft, as_lora, fold = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(load, names)
    assert relative_error(logits(names["model"]), logits(model)) < 1e-5
    exec(as_lora, names)
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    exec(fold, names)
    assert type(names["model"]) is LlamaForCausalLM
    assert relative_error(logits(names["model"]), logits(model)) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT reads an attribute that transformers has renamed
        exec(load.split("model =")[0] + by_peft, names)
    assert relative_error(logits(names["model"]), logits(model)) < 1e-5


def test_what_peft_does_not_open(tmp_path: Path) -> None:
    experts = nn.Module()
    experts.is_transposed = False  # type: ignore[assignment]
    experts.up = nn.Parameter(torch.ones(3, 4, 4))
    base = nn.ModuleDict({"experts": experts, "gate": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    fields = {"target_parameters": ["experts.up"], "rank_pattern": {"gate": 4}}
    model = hra_fx.HRAModel(base, hra_fx.HRAConfig(r=2, target_modules=["gate", "out"], **fields))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| default | . | 2 to 4 | `['gate', 'out'], ['experts.up']` |" in text
    assert "PEFT's HRA does not have `rank_pattern` and `target_parameters`. PEFT loads the LoRA that is made" in text
    assert "import peft" not in text


def test_its_metadata(tmp_path: Path) -> None:
    model = saved(tmp_path, task_type="CAUSAL_LM")
    data = ModelCard.load(tmp_path / "adapter" / "README.md").data.to_dict()
    # A folder cannot be named as the base model: the Hub refuses such a card.
    assert data == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["hra", "hra_fx", "transformers"],
    }
    model.name_or_path = "user/base"
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.create_or_update_model_card(tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.base_model == "user/base"
    assert card.data.tags == ["base_model:adapter:user/base", "hra", "hra_fx", "transformers"]
    assert card.text.lstrip().startswith("# HRA adapter of user/base\n")
    assert 'base = LlamaForCausalLM.from_pretrained("user/base")' in card.text


def test_several_adapters_and_a_model_of_no_library(tmp_path: Path) -> None:
    model = hra_fx.HRAModel(nn.Sequential(nn.Linear(4, 4)), hra_fx.HRAConfig(r=2, target_modules=["0"]), "first")
    model.add_adapter("second", hra_fx.HRAConfig(r=3, target_modules=["0"], apply_GS=True, init_weights=False))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| first | first | 2 | `['0']` |\n| second | second | 3, Gram-Schmidt | `['0']` |" in card.text
    assert f'hra_fx.load_adapter(base, "{PLACE}", subfolder="first")' in card.text
    assert "base = ...  # the base model, a Sequential" in card.text
    assert card.data.to_dict() == {"library_name": "peft", "tags": ["hra", "hra_fx"]}


def test_a_card_of_the_users_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "README.md"
    path.parent.mkdir()
    path.write_text("---\nlicense: mit\ntags:\n- poems\n---\n\n# Mine\n")
    model = saved(tmp_path)
    assert path.read_text() == "---\nlicense: mit\ntags:\n- poems\n---\n\n# Mine\n"
    model.create_or_update_model_card(path.parent)
    card = ModelCard.load(path)
    assert card.text.strip() == "# Mine"
    assert card.data.license == "mit"
    assert card.data.tags == ["hra", "hra_fx", "poems", "transformers"]
    path.write_text("---\n- not\n- a mapping\n---\n")
    with pytest.raises(hra_fx.CheckpointError, match=rf"^{re.escape(str(path))}: cannot write the model card \("):
        model.create_or_update_model_card(path.parent)


@pytest.mark.parametrize("shape", ["transform", "HRAModel"])
def test_the_trainers_card_gets_the_metadata(shape: str, tmp_path: Path) -> None:
    model = adapted("llama", shape)
    trainer = trainer_of(Trainer, "llama", model, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert "# mine" in card.text and "hra_fx" in card.data.tags and card.data.library_name == "peft"


# A server on this machine that takes uploads as the Hub does


class Hub(BaseHTTPRequestHandler):
    """One repository, whose files are kept in `files`."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        known = self.path.startswith("/user/name/resolve/main/") and self.path.rpartition("/")[2] in self.files
        headers = {"ETag": '"1"', "X-Repo-Commit": "1"} if known else {"X-Error-Code": "EntryNotFound"}
        self.answer(200 if known else 404, {}, headers)

    def do_GET(self) -> None:
        self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.repository}/commit/1", "commitOid": "1"})
        else:
            self.answer(200, {"url": self.repository, "id": "user/name", "name": "user/name"})

    @property
    def repository(self) -> str:
        return f"http://{self.headers['Host']}/user/name"

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing: the output of the tests stays readable."""


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of the repository `user/name` of a Hub."""
    held: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"files": held}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        huggingface_hub.constants.ENDPOINT, address
    )
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield held
    server.shutdown()
    thread.join()
    server.server_close()


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("shape", ["transform", "HRAModel"])
def test_push_to_hub_uploads_the_adapter_and_a_card(shape: str, files: dict[str, bytes], tmp_path: Path) -> None:
    model = adapted("llama", shape)
    url = model.push_to_hub("user/name", token="hf_x", commit_message="Mine", max_shard_size="1GB")
    assert url.endswith("/user/name/commit/1") and sorted(files) == FILES
    model.save_pretrained(tmp_path)
    assert files == {name: (tmp_path / name).read_bytes() for name in FILES}
    # The card of the repository is somebody's by now.
    files["README.md"] = b"# Mine"
    model.push_to_hub("user/name", token="hf_x")
    assert files["README.md"] == b"# Mine"


def test_push_to_hub_of_a_plain_module_and_of_none(files: dict[str, bytes]) -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(4, 4)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    hra_fx.push_to_hub(model, "user/name", token="hf_x", private=True)
    assert sorted(files) == FILES
    files.clear()
    with pytest.raises(hra_fx.AdapterError, match="has no adapters"):
        hra_fx.push_to_hub(hra_fx.fold(model), "user/name", token="hf_x")
    assert not files
