"""What all files here need: short runs, and a look at what transformers logs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """The Trainer collects garbage before every run, which would walk over all that torch and transformers hold."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning of transformers, which keeps them from other loggers unless it is told: nobody is to be frightened."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING, logger="transformers")
    yield
    transformers_logging.disable_propagation()
    records = [record for when in ("setup", "call") for record in caplog.get_records(when)]
    told = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    # Older pipelines say these of their own arguments.
    usual = ("generation flags", "`generation_config`", "`max_new_tokens`", "Device set to use")
    assert [message for message in told if not any(words in message for words in usual)] == []
