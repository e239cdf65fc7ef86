"""DDP and FSDP2 in two real processes.

All checks of a group run in one start of the processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import pytest
from integrations.distributed import accelerate_checks, adapter_checks, matrix_checks
from integrations.distributed.spawned import run

#: All but the first group are slow.
GROUPS = {
    "adapters": {**adapter_checks.CHECKS, **matrix_checks.CHECKS},
    "training": {**adapter_checks.TRAINING_CHECKS, **matrix_checks.TRAINING_CHECKS},
    "accelerate and the Trainer": accelerate_checks.CHECKS,
}
Failures: TypeAlias = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    @functools.cache
    def failures_of(group: str) -> dict[str, str]:
        return run(GROUPS[group], tmp_path_factory.mktemp("checks"))

    return failures_of


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=[] if group == "adapters" else pytest.mark.slow)
        for group, checks in GROUPS.items()
        for name in checks
    ],
)
def test_a_check_in_several_processes(group: str, name: str, failures: Failures) -> None:
    told = failures(group)[name]
    assert not told, told
