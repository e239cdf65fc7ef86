"""docs/zoo.md as it is written: totals, what is wrong, refusals with reasons, a row for each model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from zoo.result import CHECKS, LEAVES, NOT_APPLICABLE, OK, REFUSED, YES, Result
from zoo.table import markdown

ROOT = Path(__file__).parents[2]
RIGHT = Result("timm/a", matched=4, traced=YES, checks=dict.fromkeys(CHECKS, OK) | {"size": NOT_APPLICABLE})
PARTLY = Result(
    "transformers/b",
    matched=5,
    traced=f"{REFUSED}torch.export cannot capture B: it branches on a value. Leave out trace=True: it works.",
    checks=dict.fromkeys(CHECKS, OK) | {"fold": f"{REFUSED}head: tied. Wait."},
    refused={"layers.0.x": "it is Tuesday.", "layers.1.x": "it is Tuesday."},
    first_s=0.9,
    transform_s=0.6,
    trace_s=0.2,
)
WRONG = Result("timm/c", matched=1, traced=LEAVES, checks={"transform": OK, "eval": "off by 1 | 2"}, inert=["fc"])


def test_the_page() -> None:
    lines = markdown([RIGHT, PARTLY, WRONG], "torch 2; commit abc.").splitlines()
    assert {"torch 2; commit abc.", "| models with a wrong result | 1 |", "| layers adapted | 10 |"} < set(lines)
    assert "| transform time / symbolic_trace time: median, largest | 3.0, 3.0 |" in lines
    assert "| timm | 2 | 1 | 1 | 1 | 5 | 0 |" in lines
    assert "| it branches on a value. | `transformers/b` |" in lines
    assert "- `timm/c`: eval: off by 1 \\| 2" in lines
    assert "| it is Tuesday. | `transformers/b layers.*.x` × 2 |" in lines
    assert "| (fold) head: tied. Wait. | `transformers/b` |" in lines
    row = next(line for line in lines if line.startswith("| `b`"))
    assert row == "| `b` | 5 | 2 | no | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ✓ | ⊘ | 0.90s (3.0×) |"
    assert lines.index("## timm") < lines.index("## transformers")


@pytest.mark.slow
def test_the_runner_writes_a_table_and_exits_with_zero(tmp_path: Path) -> None:
    table = tmp_path / "zoo.md"
    options = ["--only", "test_vit", "squeezenet1_1", "--jobs", "1", "--table", str(table)]
    command = [sys.executable, "-m", "zoo.run", *options, "--results", str(tmp_path / "results.jsonl")]
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tests/support", "benchmarks"))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    torchvision/squeezenet1_1: 26 layers, traced" in done.stdout
    assert "| models with a wrong result | 0 |" in table.read_text()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
