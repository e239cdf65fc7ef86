"""Each test starts and ends without an open handle: what one changes in PEFT's classes is the same for all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hra_fx.integrations.peft_layers import OPEN


@pytest.fixture(autouse=True)
def no_open_handle() -> Iterator[None]:
    for handle in list(OPEN):
        handle.close()
    yield
    for handle in list(OPEN):
        handle.close()
