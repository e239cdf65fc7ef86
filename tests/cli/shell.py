"""Call the command line in a test, and check its output and exit code."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from hra_fx.cli.app import app


class Answer:
    """The output of a call, and its exit code."""

    def __init__(self, *words: object, columns: int | None = None, **env: str) -> None:
        wide = {} if columns is None else {"COLUMNS": str(columns)}
        done = CliRunner().invoke(app, [str(word) for word in words], env={**wide, **env})
        # The command line exits with a code. Any other exception fails the test.
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def answer(*words: object, **options: Any) -> str:
    """The output of a call that must succeed, with nothing on stderr."""
    done = Answer(*words, **options)
    assert (done.code, done.err) == (0, ""), done.err
    return done.out


def mistake(*words: object) -> str:
    """The error message of a call, which is one line on stderr, without a traceback."""
    done = Answer(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    return done.err.removeprefix("error: ").rstrip("\n")


def usage(*words: object) -> str:
    """The message for invalid arguments."""
    done = Answer(*words, columns=200)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: hra-fx")
    return done.err
