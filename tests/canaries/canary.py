"""A test of something private of another library that hra_fx reads. Its failure names the release and what breaks.

The other tests say that a result is wrong. A canary says why: the library has changed, where hra_fx reads it, and what
no longer works. Each calls the library itself, without mocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def canary(library: str, structure: str, *, reader: str, breaks: str) -> Callable[[Callable[..., None]], Any]:
    """Decorate the test of a private structure.

    Args:
        library: its distribution, such as "accelerate".
        structure: what hra_fx reads of it.
        reader: the file that reads it.
        breaks: what no longer works if it has changed.
    """
    assert (ROOT / reader).is_file(), reader

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:
                raise AssertionError(
                    f"{library} {version(library)} has changed {structure}, which {reader} reads. This breaks: "
                    f"{breaks}. Found: {type(error).__name__}: {error}"
                ) from error

        return run

    return decorate
