"""DDP and FSDP2 with two real processes. All checks of a kind run in one start of them."""

from __future__ import annotations

import pytest
from integrations.distributed import accelerate_checks, adapter_checks, meta_checks, scale_checks, training_checks
from integrations.distributed.spawned import run

QUICK = {**adapter_checks.CHECKS, **meta_checks.CHECKS, **scale_checks.CHECKS}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def training_failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(training_checks.CHECKS, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def accelerate_failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(accelerate_checks.CHECKS, tmp_path_factory.mktemp("accelerate"))


@pytest.mark.slow
@pytest.mark.parametrize("name", accelerate_checks.CHECKS)
def test_accelerate_and_the_trainer_in_two_processes(name: str, accelerate_failures: dict[str, str]) -> None:
    assert not accelerate_failures[name], accelerate_failures[name]


@pytest.mark.parametrize("name", QUICK)
def test_adapters_in_two_processes(name: str, failures: dict[str, str]) -> None:
    assert not failures[name], failures[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", training_checks.CHECKS)
def test_training_in_two_processes(name: str, training_failures: dict[str, str]) -> None:
    assert not training_failures[name], training_failures[name]
