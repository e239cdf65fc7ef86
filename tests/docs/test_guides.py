"""The programs of the guides run as they stand: some by themselves, without warnings, and others with given names.

Links of documents that are not pages lead to files; `make docs` checks the pages. The reference has each public name.
"""

from __future__ import annotations

import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from docs.guide_names import GIVEN, given
from documents import DOCS, ROOT, python_blocks, run_blocks
from torch import distributed
from transformers import training_args

import hra_fx
from hra_fx import passes

#: The changelog and the guide for upgrades name what was removed.
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted(DOCS.rglob("*.md")) if page.stem != "upgrading"),
]
#: Guides whose programs run by themselves, and what their folders have afterwards.
GUIDES = {
    "index": {"adapters.html", "folded", "my-adapter", "my-lora"},
    "layers": set(),
    "several-adapters": set(),
    "inspect": {"adapters.html", "block.svg"},
    "how-it-works": set(),
}
#: The first guides that a user reads. The others run in `make test-all`.
MAIN = ("index", "training")
#: Documents whose programs other tests run, or that show calls without a model.
RUN_ELSEWHERE = ("README", "export", "torch_joint_gradients")


def some_slow(names: Iterable[str]) -> list[object]:
    return [name if name in MAIN else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(GUIDES))
def test_the_programs_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(DOCS / f"{name}.md")
    assert {entry.name for entry in tmp_path.iterdir()} == GUIDES[name]


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment that torchrun gives to a single process; no process group afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the mixed precision of a guide in the process
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("under_torchrun")
@pytest.mark.parametrize("name", some_slow(GIVEN))
def test_the_programs_run_with_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # TRL trains in bfloat16, which CPUs can do too, but its configurations only accept on a GPU.
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    torch.manual_seed(0)
    run_blocks(DOCS / f"{name}.md", given(name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_programs_compile_name_what_exists_and_run_unless_a_comment_says_why(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = python_blocks(document)
    assert len(blocks) == len(re.findall("^ *```python", text, re.MULTILINE))
    for block in blocks:
        compile(block.text, str(document), "exec")
    if any(not block.comment for block in blocks):
        assert document.stem in {*GUIDES, *GIVEN, *RUN_ELSEWHERE}
    named = set(re.findall(r"(?<![\w/.-])hra_fx\.(\w+)(?![\w/]|\.json|\.md)", text))
    assert {name for name in named if not hasattr(hra_fx, name) and not find_spec(f"hra_fx.{name}")} == set()


def test_links_lead_to_files() -> None:
    found = {
        link
        for document in ROOT.glob("*.md")
        for link in re.findall(r"(?:\]\(|src=\"|href=\")([^)#\"\s]+)", document.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", link)
    }
    assert len(found) > 5
    assert [link for link in found if not (ROOT / link).exists()] == []


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    shown = Counter(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    names = {f"hra_fx.{name}" for name in hra_fx.__all__}
    names |= {f"{getattr(passes, name).__module__}.{name}" for name in passes.__all__}
    assert shown == Counter(names)
