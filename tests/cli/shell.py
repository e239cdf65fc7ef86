"""The command line as a test calls it, and small models and adapters on disk."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from hra_fx.cli.app import app


class Answer:
    """What a call printed, and its exit code."""

    def __init__(self, *words: object, columns: int | None = None, **env: str) -> None:
        wide = {} if columns is None else {"COLUMNS": str(columns)}
        done = CliRunner().invoke(app, [str(word) for word in words], env={**wide, **env})
        # What is no answer of the command line is an error of the test.
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def answer(*words: object, **options: Any) -> str:
    """What a call that is to succeed printed, with nothing on stderr."""
    done = Answer(*words, **options)
    assert (done.code, done.err) == (0, ""), done.err
    return done.out


def mistake(*words: object) -> str:
    """The one line that tells of a mistake of the user's; nothing is on stdout, and no traceback."""
    done = Answer(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    return done.err.removeprefix("error: ").rstrip("\n")


def usage(*words: object) -> str:
    """What is said of words that are no command, without its frame."""
    done = Answer(*words, columns=200)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: hra-fx")
    return done.err
