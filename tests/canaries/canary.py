"""A test of something private of another library that hra_fx reads. Its failure names the release and what breaks.

The other tests say that a result is wrong. A canary says why: the library has changed, where hra_fx reads it, and what
no longer works. Each calls the library itself, without mocks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Where `make test-all` installs DeepSpeed, beside the environment.
DEEPSPEED = str(Path(sys.prefix, "deepspeed"))


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
                (installed,) = {one.version for one in distributions(name=library, path=[*sys.path, DEEPSPEED])}
                raise AssertionError(
                    f"{library} {installed} has changed {structure}, which {reader} reads. This breaks: "
                    f"{breaks}. Found: {type(error).__name__}: {error}"
                ) from error

        return run

    return decorate
