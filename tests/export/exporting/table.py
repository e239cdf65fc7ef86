"""Exports every model in every form with every exporter, and prints a table of errors.

    PYTHONPATH=tests:tests/support python -m export.exporting.table    # about 20 minutes on 2 cores
    PYTHONPATH=tests:tests/support python -m export.exporting.table --models BERT --exporters onnx xnnpack

Exporters whose package is not installed are skipped and listed. Each cell is computed in its own process, because a
runtime may crash.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import logging
import multiprocessing as mp
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from export.exporting.exporters import EXPORTERS
from export.exporting.models import CALLED_AT, EXPORTED_AT, MODELS
from torch import Tensor
from torch.export import ExportedProgram

import hra_fx

FORMS = ("folded", "lowered")
LIMIT = 1e-5


@functools.cache
def expected(name: str) -> Tensor:
    """The output of the adapted model in PyTorch."""
    with torch.no_grad():
        result: Tensor = MODELS[name].adapted()(*MODELS[name].inputs(*CALLED_AT[name]))
    return result


@functools.cache
def moved(name: str) -> float:
    """How much the adapter changes the output. It must be far above `LIMIT` to detect a lost adapter."""
    whole = MODELS[name].adapted()
    with torch.no_grad(), hra_fx.disable_adapters(whole.model):
        return distance(whole(*MODELS[name].inputs(*CALLED_AT[name])), expected(name))


@functools.cache
def program(name: str, form: str, dynamic: bool) -> ExportedProgram:
    """A model in one form, with dynamic shapes or for the sizes of the compared call."""
    model = MODELS[name]
    whole = model.folded() if form == "folded" else model.adapted()
    inputs = model.inputs(*(EXPORTED_AT if dynamic else CALLED_AT)[name])
    return torch.export.export(whole, inputs, dynamic_shapes=(model.dynamic,) if dynamic else None)


def distance(actual: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference, divided by the largest expected value if that is over 1."""
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    return float((actual - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def error_of(name: str, form: str, exporter: str) -> float:
    """The distance of a runtime's output from PyTorch's."""
    way = EXPORTERS[exporter]
    with torch.no_grad():
        actual = way.run(program(name, form, way.dynamic), MODELS[name].inputs(*CALLED_AT[name]))
    return distance(actual, expected(name))


def cell(name: str, form: str, exporter: str) -> str:
    """The error of a cell, or the reason why there is none."""
    with ProcessPoolExecutor(1, mp.get_context("fork")) as pool:
        try:
            error = pool.submit(error_of, name, form, exporter).result()
        except Exception as failure:
            return f"no: {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    return f"{error:.0e}" if error <= LIMIT else f"no: an error of {error:.1e}"


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(f"{package} is not installed", file=sys.stderr)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--exporters", nargs="+", choices=list(EXPORTERS), default=list(EXPORTERS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    ways = [exporter for exporter in given.exporters if installed(EXPORTERS[exporter].package)]
    print("| model | form | " + " | ".join(EXPORTERS[way].title for way in ways) + " |")
    print("|---" * (len(ways) + 2) + "|", flush=True)
    for name in given.models:
        expected(name)  # the processes of the cells inherit it
        for form in FORMS:
            print(f"| {name} | {form} | " + " | ".join(cell(name, form, way) for way in ways) + " |", flush=True)
    print("How far the adapters move the outputs: " + ", ".join(f"{name} {moved(name):.2f}" for name in given.models))


if __name__ == "__main__":
    main()
