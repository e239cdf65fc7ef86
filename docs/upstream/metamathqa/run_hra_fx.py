"""Run an experiment of PEFT's MetaMathQA benchmark with the layers of hra_fx, which train pairs.

This file belongs next to the benchmark's `run.py`. It takes the same arguments, and `--protect`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hra_fx


def with_hra_fx(get_model: Callable[..., Any], protected: bool) -> Callable[..., Any]:
    """Wrap the benchmark's `get_model`, so that its model gets the layers of hra_fx, protected on texts of its own."""

    def wrapped(**kwargs: Any) -> Any:
        model = get_model(**kwargs)
        hra_fx.from_peft(model)
        if protected:
            print(hra_fx.protect(model), file=sys.stderr)
        return model

    return wrapped


if __name__ == "__main__":
    import utils  # of the benchmark

    protected = "--protect" in sys.argv
    if protected:
        sys.argv.remove("--protect")
    utils.get_model = with_hra_fx(utils.get_model, protected)
    runpy.run_path(str(Path(__file__).with_name("run.py")), run_name="__main__")
