"""The benchmark for GPUs, run on the CPU as it is without the project installed, and its parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from gpu import correctness
from gpu.page import page
from gpu.plan import smoke
from gpu.report import Report
from gpu.run import Run, WrongResult

ROOT = Path(__file__).resolve().parents[2]
#: Where packages lie. Without `site`, .pth files are not read, so an editable installation is not seen.
PACKAGES = os.pathsep.join(sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")}))


def python(*arguments: str, path: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_it_runs_without_the_project_installed(tmp_path: Path) -> None:
    assert "No module named 'hra_fx'" in python("-c", "import hra_fx", path=PACKAGES, folder=tmp_path).stderr
    path = os.pathsep.join([".", "benchmarks", PACKAGES])
    done = python("-m", "gpu", "--smoke", "--out", str(tmp_path), path=path, folder=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmarks_gpu.json").read_text())
    assert found["failures"] == {}
    assert [check["holds"] for check in found["checks"] if check["group"] == "Correctness"] == [True] * 12
    assert {check["detail"] for check in found["checks"] if check["holds"] is None} == {"needs CUDA"}
    waits = [check["holds"] for check in found["checks"] if check["group"] == "The host does not wait for the device"]
    assert waits == [True] * 9
    for cell in found["cells"]:
        needs_cuda = cell["setting"]["mode"] == "graphed"
        assert (cell["measured"]["values"] == {}) is needs_cuda
        assert set(cell["measured"]["left_out"].values()) == ({"needs CUDA"} if needs_cuda else set())
    assert all(found["launches"]["operators"][0]["launches"][key] for key in ("lora", "ours", "ours-gs"))
    assert all(ratio["value"] > 0 for ratio in found["ratios"])
    assert len(found["ratios"]) == 3 * 4 + 2, "three kinds of work with four methods, and two graphs"
    text = (tmp_path / "benchmarks_gpu.md").read_text()
    assert "## Correctness" in text
    assert "| ResNet blocks of 32, 64 channels, latents of 16 | 1 image " in text


def test_a_wrong_result_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correctness.TOLERANCE, torch.float32, 0.0)
    files = list[str]()
    report = Report({"run": "smoke"})
    run = Run(smoke(), report, 1.0, lambda: files.append(page(report)))
    with pytest.raises(WrongResult, match=r"Linear, input 64 x \d+, float32: relative errors: output"):
        run.all()
    assert run.report.cells == []
    assert re.search(r"\| Linear, input 64 x \d+, float32 \| \*\*no\*\* \|", files[-1])
