"""The Trainer collects garbage before every run, which walks over all that torch and transformers hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """What the imports left is not looked through again in each of many short runs."""
    gc.freeze()
    yield
    gc.unfreeze()
