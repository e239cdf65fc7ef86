"""What the speed benchmark measures: the steps, whose weights they use, memory; and a whole run on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from speed import cli, running
from speed.grid import Job
from speed.methods import INFERENCE, TRAINING
from speed.results import Results, load
from speed.setting import Mode, Setting
from speed.timing import Budget

TINY = "llama-64x1"
TWO = Budget(seconds=0, least=2)


def jobs() -> list[Job]:
    modes: list[tuple[Mode, int, tuple[str, ...]]] = [
        ("training", 4, TRAINING),
        ("inference", 4, INFERENCE),
        ("generate", 2, ("base", "lora", "ours")),
        ("transform", 0, ("lora", "peft-hra", "ours")),
        ("fold", 0, ("lora", "peft-hra", "ours")),
    ]
    return [Job(Setting(TINY, mode, size, r=4), methods, TWO) for mode, size, methods in modes]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """A run of the command line, whose only jobs are tiny, and the file of its numbers."""
    file = tmp_path_factory.mktemp("speed") / "numbers.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(running.RUNS, "full", jobs)
        assert cli.main(["--json", str(file)]) == 0
    return load(file), file


def test_every_method_is_measured_in_every_round(run: tuple[Results, Path]) -> None:
    results, _ = run
    assert [cell.setting for cell in results.cells] == [job.setting for job in jobs()]
    for cell, job in zip(results.cells, jobs(), strict=True):
        assert cell.measured.left_out == {}
        assert set(cell.measured.values) == set(job.methods) == set(cell.measured.first)
        assert all(value > 0 for value in cell.measured.first.values())
        assert {len(values) for values in cell.measured.values.values()} == {2}
        assert all(value for values in cell.measured.values.values() for value in values if value is not None)
        fast = cell.measured.values["base" if "base" in job.methods else "lora"]
        assert None not in fast


def test_docs_are_written_only_where_asked_for(run: tuple[Results, Path], tmp_path: Path) -> None:
    _, file = run
    before = sorted((cli.ROOT / "docs").iterdir())
    assert cli.main(["--from", str(file)]) == 0
    assert sorted((cli.ROOT / "docs").iterdir()) == before
    assert cli.main(["--from", str(file), "--docs", str(tmp_path)]) == 0
    assert [made.name for made in tmp_path.iterdir()] == ["benchmarks.md"], "one size of tokens is no curve"
