"""The experiments for PEFT's benchmark are PEFT's configurations, and a harness like PEFT's runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
from documents import ROOT

FOLDER = ROOT / "benchmarks/peft_method_comparison"
EXPERIMENTS = sorted(
    str(file.parent.relative_to(FOLDER)) for file in FOLDER.glob("*/experiments/*/*/adapter_config.json")
)
UTILS = """
import torch
def get_optimizer_and_scheduler(model, *, optimizer_type, **kwargs):
    return getattr(torch.optim, optimizer_type)(model.parameters(), **kwargs), None
"""
#: Like PEFT's: it imports its own modules, reads the configuration of the experiment, and trains.
RUN = """
import json, sys, torch, peft
from utils import get_optimizer_and_scheduler
config = peft.PeftConfig.from_pretrained(sys.argv[1])
config.r, config.target_modules = 4, ["0"]
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
optimizer, _ = get_optimizer_and_scheduler(model, optimizer_type="AdamW", lr=1e-2)
model(torch.ones(2, 8)).square().sum().backward()
optimizer.step()
json.dump({
    "options": sys.argv[1:],
    "kernels": type(model.base_model.model[0]).__mro__[1].__module__.partition(".")[0],
    "pairs": "hra_pair_difference" in optimizer.state_dict()["param_groups"][0],
}, open("result.json", "w"))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for task in ("MetaMathQA", "image-gen"):
        folder = tmp_path / "method_comparison" / task
        folder.mkdir(parents=True)
        (folder / "utils.py").write_text(UTILS)
        (folder / "run.py").write_text(RUN)
    return tmp_path


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, FOLDER / "run.py", *map(str, words)], capture_output=True, text=True)


def test_the_configurations_are_those_of_peft() -> None:
    assert len(EXPERIMENTS) == 5
    for name in EXPERIMENTS:
        with warnings.catch_warnings(action="error"):  # of unknown fields
            config = peft.PeftConfig.from_pretrained(str(FOLDER / name))
        assert isinstance(config, peft.HRAConfig)
        assert f"rank{config.r}" in name
        params = FOLDER / name / "training_params.json"
        rate = json.loads(params.read_text())["optimizer_kwargs"]["lr"] if params.exists() else 1e-4
        assert (f"lr_{rate}" in name) is params.exists()


@pytest.mark.parametrize(("name", "plain"), [(EXPERIMENTS[-1], ()), (EXPERIMENTS[0], ("--plain",))])
def test_the_program_runs_the_harness(name: str, plain: tuple[str, ...], clone: Path) -> None:
    task, _, path = name.partition("/")
    done = run(clone, name, *plain, "-v", "--clean")
    assert done.returncode == 0, done.stderr
    result = json.loads((clone / "method_comparison" / task / "result.json").read_text())
    is_pairs = name.endswith("-pairs")
    assert result == {"options": [path, "-v", "--clean"], "kernels": "torch" if plain else "hra_fx", "pairs": is_pairs}


def test_wrong_arguments_are_named(clone: Path) -> None:
    pairs = next(name for name in EXPERIMENTS if name.endswith("-pairs"))
    for words, reason in (
        ((clone / "no", pairs), "does not contain run.py. Pass a clone of"),
        ((clone, "MetaMathQA/experiments/hra/none"), "there is no adapter_config.json"),
        ((clone, pairs, "--plain"), "PEFT cannot train in pairs"),
    ):
        done = run(*words)
        assert done.returncode == 2
        assert reason in done.stderr
