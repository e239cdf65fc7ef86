"""Processes of launchers: DeepSpeed's ZeRO-2 and ZeRO-3 against one process without it, and the example.

DeepSpeed is on the path of the processes that are started here only: transformers, accelerate and TRL import it
wherever they find it. `make test-all` installs it beside the environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_examples import EXPECTED, FOLDER

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
#: `make test-all` installs DeepSpeed there, outside of the environment.
DEEPSPEED = str(Path(sys.prefix, "deepspeed"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.llama(num_attention_heads=2).save_pretrained(folder)
    return folder


def losses(base: Path, stage: int, steps: int, output: Path, *options: str, processes: int = 2) -> list[float]:
    assert Path(DEEPSPEED, "deepspeed").is_dir(), "DeepSpeed is missing. Run `make test-all`, which installs it."
    script = [str(HERE / "deepspeed_training.py"), str(base), str(stage), str(steps), str(output), *options]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if stage else []
    path = os.pathsep.join([*([DEEPSPEED] if stage else []), *sys.path])
    done = subprocess.run(
        [sys.executable, *launcher, *script],
        **{"capture_output": True, "text": True, "timeout": 400},
        # DeepSpeed compiles there. The home folder may not be writable, or have the lock of a build that was killed.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": f"{base}-extensions"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("losses: ")[2])


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process without DeepSpeed."""
    found = losses(base, 0, 3, tmp_path_factory.mktemp("plain"))
    assert max(found) - min(found) > 1e-2  # else other losses would do
    return found


@pytest.fixture(scope="module")
def protected(base: Path, plain: list[float], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """The same of a protected model, and its adapter."""
    folder = tmp_path_factory.mktemp("protected")
    found = losses(base, 0, 4, folder, "--protect")
    assert found[1] != pytest.approx(plain[1], abs=1e-4)
    return found, folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_and_a_restart_from_its_checkpoint(
    stage: int, base: Path, protected: tuple[list[float], Path], tmp_path: Path
) -> None:
    """The new model is protected by the checkpoint."""
    assert losses(base, stage, 2, tmp_path, "--protect") == pytest.approx(protected[0][:2], abs=1e-5)
    found = losses(base, stage, 4, tmp_path, "--protect", "--resume")
    assert found == pytest.approx(protected[0], abs=1e-5)
    saved, wanted = (load_file(place / "final" / "adapter_model.safetensors") for place in (tmp_path, protected[1]))
    assert len(wanted) == 14
    torch.testing.assert_close(saved, wanted, atol=1e-4, rtol=0)


def test_zero_3_in_one_process(base: Path, plain: list[float], tmp_path: Path) -> None:
    """It makes vectors whole at the start of a step, and partitions them in the middle of the backward pass."""
    assert losses(base, 3, 3, tmp_path, processes=1) == pytest.approx(plain, abs=1e-5)


def test_the_example_runs_in_two_processes() -> None:
    """By itself, it starts them."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(FOLDER / "distributed.py")],
        **{"capture_output": True, "text": True, "timeout": 240, "env": {**os.environ, "OMP_NUM_THREADS": "1"}},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("started by a launcher\n") and done.stdout.count("one group:") == 1, done.stdout
    for pattern in EXPECTED["distributed"]:
        assert re.search(pattern, done.stdout), done.stdout
