"""Tensor parallelism with two real processes, and with FSDP2 in four. All checks of a kind run in one start of them."""

from __future__ import annotations

import pytest
from integrations.distributed import mesh_checks, tensor_parallel_checks
from integrations.distributed.spawned import run


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(tensor_parallel_checks.CHECKS, tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="module")
def mesh_failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(mesh_checks.CHECKS, tmp_path_factory.mktemp("mesh"), mesh_checks.WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("name", tensor_parallel_checks.CHECKS)
def test_two_processes(name: str, failures: dict[str, str]) -> None:
    assert not failures[name], failures[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", mesh_checks.CHECKS)
def test_mesh_of_four_processes(name: str, mesh_failures: dict[str, str]) -> None:
    assert not mesh_failures[name], mesh_failures[name]
