"""Run an experiment with PEFT's own benchmark (`method_comparison`) and the kernels of hra_fx; see README.md.

python run.py ~/peft MetaMathQA/experiments/hra/llama-3.2-3B-rank64-pairs -v
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: An experiment whose name ends like this trains the vectors in pairs.
PAIRS = "-pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="a clone of huggingface/peft, from which PEFT is installed")
    parser.add_argument("experiment", help="a folder of this folder, or of method_comparison in the clone")
    parser.add_argument("--plain", action="store_true", help="PEFT's own code, without hra_fx")
    arguments, rest = parser.parse_known_args()
    task, _, path = arguments.experiment.rstrip("/").partition("/")
    harness = arguments.peft.resolve() / "method_comparison" / task
    if not (harness / "run.py").is_file():
        parser.error(f"{harness} does not contain run.py. Pass a clone of https://github.com/huggingface/peft.")
    if not any((folder / path / "adapter_config.json").is_file() for folder in (HERE / task, harness)):
        parser.error(f"{arguments.experiment}: there is no adapter_config.json, here or in {harness}.")
    in_pairs = path.endswith(PAIRS)
    if in_pairs and arguments.plain:
        parser.error("--plain: PEFT cannot train in pairs. Choose an experiment without them.")
    if (HERE / task / path).is_dir():
        shutil.copytree(HERE / task / path, harness / path, dirs_exist_ok=True)
    os.chdir(harness)
    sys.path.insert(0, str(harness))
    sys.argv = ["run.py", path, *rest]
    import hra_fx  # late, so that wrong arguments are reported at once

    if in_pairs:
        train_in_pairs(hra_fx.train_pairs)
    with contextlib.nullcontext() if arguments.plain else hra_fx.accelerate_peft():
        runpy.run_path("run.py", run_name="__main__")


def train_in_pairs(train_pairs: Callable[..., None]) -> None:
    """Make the harness train the vectors of its model in pairs."""
    import utils  # the harness's own

    made = utils.get_optimizer_and_scheduler

    def get_optimizer_and_scheduler(model: Any, **options: Any) -> Any:
        optimizer, scheduler = made(model, **options)
        train_pairs(optimizer, model)
        return optimizer, scheduler

    utils.get_optimizer_and_scheduler = get_optimizer_and_scheduler


if __name__ == "__main__":
    main()
