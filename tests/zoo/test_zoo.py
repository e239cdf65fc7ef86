"""Some quick models of the zoo, and its runner. `make zoo` checks all models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from zoo.checks import check
from zoo.models import entries, named
from zoo.result import CHECKS

ROOT = Path(__file__).parents[2]
ENTRIES = entries()
#: Quick ones of each library: convolutions, attention, readers of weights (beit, swin), tied weights (gpt2).
QUICK = (
    *("torchvision/swin_t", "timm/vit_tiny_patch16_224", "timm/beit_base_patch16_224", "timm/test_nfnet"),
    "transformers/gpt2",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert list(result.checks) == list(CHECKS)
    assert result.matched


def test_entries_are_named_by_patterns_with_or_without_the_library() -> None:
    wanted = ["torchvision/swin_s", "torchvision/swin_t", "transformers/bert"]
    assert list(named(["transformers/bert", "swin_[st]"])) == wanted


@pytest.mark.slow
def test_the_runner_keeps_results_and_exits_with_zero(tmp_path: Path) -> None:
    options = ["--only", "test_vit", "squeezenet1_1", "--jobs", "1", "--results", str(tmp_path / "results.jsonl")]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/support", "benchmarks"))

    def run() -> str:
        command = [sys.executable, "-m", "zoo.run", *options, "--resume"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "ok    torchvision/squeezenet1_1: 26 layers, torch.fx\n" in run()
    assert "[1/" not in run()
