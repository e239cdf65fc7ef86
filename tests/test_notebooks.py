"""The notebooks: as stored, they are executed, small, and free of errors and local paths; and they run again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("finetune_and_serve", "graph_mode", "quickstart")
LOCAL = re.compile(r"(?<![\w.])/(bin|home|mnt|opt|root|tmp|usr|Users|var|venv|work)/|\b[A-Z]:\\|site-packages|file://")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def check_outputs(notebook: Any) -> None:
    """All cells ran, in order, without errors, progress bars and colors of a terminal."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error", output
        assert "\x1b" not in str(output), output
        assert output.output_type != "display_data", output


def printed(notebook: Any, stream: str) -> str:
    return "".join(output.text for output in outputs(notebook) if output.get("name") == stream)


def claims(notebook: Any) -> list[str]:
    """What the cells print about equality."""
    return re.findall(r"^.*: (?:True|False)$", printed(notebook, "stdout"), re.M)


def test_every_notebook_is_tested() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook(name: str) -> None:
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert not LOCAL.findall(text)
    notebook = read(name)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert not printed(notebook, "stderr")
    assert claims(notebook)
    assert not [claim for claim in claims(notebook) if claim.endswith("False")]
    for cell in notebook.cells:
        for link in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
            assert (FOLDER / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_says_the_same(name: str) -> None:
    notebook, stored = read(name), read(name)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(FOLDER)}}).execute()
    check_outputs(notebook)
    assert "Warning" not in printed(notebook, "stderr")  # other libraries may write there about the machine
    assert claims(notebook) == claims(stored)


@pytest.mark.parametrize("text", ["/home/me/x", "in /tmp/x", '"/work/x', r"C:\x", "lib/site-packages/x", "file://x"])
def test_a_local_path_is_found(text: str) -> None:
    assert LOCAL.search(text)
    assert not LOCAL.search("../docs/training.md https://arxiv.org/abs/2405.17484 model/work/x")
