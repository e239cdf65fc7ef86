"""What all commands share: errors, help, the version, colors, and the page docs/inspect.md."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import Shelf
from cli.shell import Answer, answer

import hra_fx

COMMANDS = ["inspect", "match", "fold", "convert"]


def test_there_is_one_version() -> None:
    """pyproject.toml reads it from the package, and so does the command line. Two more files name the last release."""
    assert answer("--version") == f"hra-fx {hra_fx.__version__}\n"
    root = Path(__file__).parents[2]
    project, citation, changes = (
        (root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    releases = re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", changes, re.MULTILINE)
    assert releases[0][0] == hra_fx.__version__
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [hra_fx.__version__]
    assert re.findall(r'^date-released: "(.*)"$', citation, re.MULTILINE) == [releases[0][1]]
    assert re.search(r'^version = \{ attr = "hra_fx.version.VERSION" \}$', project, re.MULTILINE)
    assert importlib.metadata.version("hra-fx") == hra_fx.__version__


def test_the_help_lists_all_commands_and_exit_codes() -> None:
    text = answer("--help", columns=100)
    assert all(re.search(rf"^│ {command} ", text, re.MULTILINE) for command in COMMANDS)
    assert "Exit codes: 0 success; 1 the configuration does not match the model" in text


def test_colors(shelf: Shelf) -> None:
    words, forced = ("inspect", shelf / "second"), {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    said = ("inspect", "no/such/folder")
    assert "\x1b[" not in answer(*words) + Answer(*said).err
    assert "\x1b[1;31merror" in Answer(*said, columns=80, **forced).err
    # NO_COLOR disables colors only, not bold or dim text.
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", Answer(*said, columns=80, NO_COLOR="1", **forced).err)


def shell(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from hra_fx.cli.app import app; "
        "assert CliRunner().invoke(app, ['fold', '--help']).exit_code == 0; "
        "assert not {'torch', 'transformers', 'safetensors', 'numpy'} & sys.modules.keys()"
    )
    done = shell(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


PAGE = Path(__file__).resolve().parents[2] / "docs" / "inspect.md"


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands in all console blocks, and the lines below each."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for call in block.split("$ ")[1:]:
            command, *lines = call.splitlines()
            yield command, lines


def printed(done: Answer, here: Path) -> list[str]:
    return (done.err + done.out).replace(f"{here}/", "").splitlines()


def test_the_page(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("my-model", "my-adapter", "second"):
        shutil.copytree(shelf / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    seen, done = set(), None
    for command, lines in calls(PAGE.read_text(encoding="utf-8")):
        if command == "echo $?":
            assert done is not None and lines == [str(done.code)]
            continue
        program, *words = shlex.split(command)
        done = Answer(*words, columns=80)
        seen.add(words[0])
        found = printed(done, tmp_path.resolve())
        while found and not found[-1]:
            found.pop()
        assert (program, found) == ("hra-fx", lines), command
    assert seen == {"match", "inspect"}
