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


def cell(name: str, form: str, exporter: str) -> float | str:
    """The error of a cell, or the reason why there is none."""
    with ProcessPoolExecutor(1, mp.get_context("fork")) as pool:
        try:
            return pool.submit(error_of, name, form, exporter).result()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def prepare(name: str, form: str, exporters: list[str]) -> None:
    """Fill the caches that the processes of a row inherit."""
    expected(name)
    for dynamic in sorted({EXPORTERS[exporter].dynamic for exporter in exporters}):
        program(name, form, dynamic)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--exporters", nargs="+", choices=list(EXPORTERS), default=list(EXPORTERS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    versions = {exporter: version(EXPORTERS[exporter].package) for exporter in given.exporters}
    ways = [exporter for exporter, found in versions.items() if found]
    reasons: list[str] = []
    print("| model | form | " + " | ".join(EXPORTERS[way].title for way in ways) + " |")
    print("|---" * (len(ways) + 2) + "|", flush=True)
    for name in given.models:
        for form in FORMS:
            prepare(name, form, ways)
            found = {way: cell(name, form, way) for way in ways}
            texts = []
            for way, error in found.items():
                fine = isinstance(error, float) and error <= LIMIT
                texts.append(f"{error:.0e}" if fine else f"no ({len(reasons) + 1})")
                if not fine:
                    said = f"an error of {error:.1e}" if isinstance(error, float) else error
                    reasons.append(f"{len(reasons) + 1}. {name}, {form}, {EXPORTERS[way].title}: {said}")
            print(f"| {name} | {form} | " + " | ".join(texts) + " |", flush=True)
    print("\n" + "\n".join(reasons) if reasons else "")
    moves = ", ".join(f"{name} {moved(name):.2f}" for name in given.models)
    print(f"How far the adapters move the outputs: {moves}.")
    print("With " + ", ".join(f"{EXPORTERS[way].package} {versions[way]}" for way in ways) + ".")
    for missing in (way for way in given.exporters if way not in ways):
        print(f"{EXPORTERS[missing].title}: skipped, {EXPORTERS[missing].package} is not installed.", file=sys.stderr)


if __name__ == "__main__":
    main()
