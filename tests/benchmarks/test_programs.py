"""Each benchmark runs in its smallest form, and its numbers follow from what it measured."""

from __future__ import annotations

from pathlib import Path

import gpu.__main__
import host
import pairs
import pytest
import torch
from speed import cli
from speed.grid import smoke
from speed.ratios import Ratio, ratio
from speed.results import load


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--smoke"])


@pytest.mark.slow  # `test_the_others_run` and the one for GPUs have the same methods, in one process
def test_speed_measures_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "numbers.json"
    assert cli.main(["--smoke", "--json", str(file)]) == 0
    results = load(file)
    assert [cell.setting for cell in results.cells] == [job.setting for job in smoke()]
    for cell, job in zip(results.cells, smoke(), strict=True):
        assert cell.measured.left_out == {} and set(cell.measured.values) == set(job.methods)
        assert all(value is None or value > 0 for values in cell.measured.values.values() for value in values)
    rows = [line.count("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(results.cells) and len(set(rows)) == 1


def test_a_ratio_is_the_median_over_common_rounds() -> None:
    """The interval of nine pairs, by the sign test, leaves out the least and the largest."""
    assert ratio([None, 2.0, 3.0, 4.0], [1.0, None, 1.0, 2.0]) == Ratio(median=2.5, low=2.0, high=3.0, rounds=2)
    assert ratio([float(k) for k in range(1, 10)], [1.0] * 9) == Ratio(median=5.0, low=2.0, high=8.0, rounds=9)
    assert ratio([None, 1.0], [1.0, None]) is None


def test_the_one_for_gpus_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.__main__.main(["--smoke"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("- right: ") == 12 and "| hra_fx / PEFT LoRA |" in printed


def test_it_ends_at_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(gpu.correctness.TOLERANCE, torch.float32, 0.0)
    assert gpu.__main__.main(["--smoke"]) == 1
    printed = capsys.readouterr().out
    assert "- **WRONG**: Linear, input 64 x 64, float32: relative errors: output" in printed and "|" not in printed


def test_host_time_is_that_of_few_functions_of_hra_fx() -> None:
    added = dict(host.added(host.models(1), dict.fromkeys(host.ROUNDS, 1)))
    assert set(added) == set(host.ROUNDS) and all(found[host.LORA] == 1 for found in added.values())
    inside, outside = host.frames(host.adapted_model().train())
    assert inside <= 4, "in each layer"
    assert outside < 3, "in the batch, for each layer"
    calls, files = host.calls_and_files()
    assert calls <= 30 and files <= 8
    transformed, loaded = host.walks_of_transform_and_load()
    assert transformed <= 3 and loaded <= 4


def test_the_others_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pairs, "LAYERS", 2)
    monkeypatch.setattr(pairs, "TARGETS", ["0", "1"])
    pairs.main(rounds=1)
    printed = capsys.readouterr().out
    assert printed.count("relative to vectors: pairs ") == 2
