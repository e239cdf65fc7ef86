"""torch.distributed as it is: DDP and FSDP2 with two processes. All checks run in one start of them."""

from __future__ import annotations

import pytest
from integrations.distributed import adapter_checks, trainer_checks, training_checks
from integrations.distributed.spawned import run

CHECKS = training_checks.CHECKS | adapter_checks.CHECKS | trainer_checks.CHECKS


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(CHECKS, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CHECKS)
def test_in_two_processes(name: str, failures: dict[str, str]) -> None:
    assert not failures[name], failures[name]
