"""A decorator for tests of private structures of other libraries. A failure names the release and what breaks.

Other tests show that a result is wrong. A canary shows why: which library has changed, which file of hra_fx reads the
structure, and what no longer works.
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
#: `make test-all` installs DeepSpeed there, outside of the environment.
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
