"""Every command in `docs/cli.md` prints what stands below it there, in a terminal of 80 columns."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import Shelf
from cli.shell import Answer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Commands and the lines below them, of all blocks of a console."""
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for call in block.split("$ ")[1:]:
            command, *lines = call.splitlines()
            yield command, lines


def printed(done: Answer, here: Path) -> list[str]:
    text = (done.err + done.out).replace(f"{here}/", "")
    return re.sub(r"in \d+\.\d s$", "in 0.1 s", text, flags=re.MULTILINE).splitlines()


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
        found = [line.rstrip() for line in printed(done, tmp_path.resolve())]
        while found and not found[-1]:
            found.pop()
        assert (program, found) == ("hra-fx", lines), command
    assert seen >= {"inspect", "match", "scale", "fold", "unfold", "convert", "visualize"}
