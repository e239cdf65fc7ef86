"""Runs the zoo: JSON lines to build/zoo while it runs, and the records of all models to docs/zoo.json.

    PYTHONPATH=tests:tests/support:benchmarks python -m zoo.run    # all of it
    PYTHONPATH=tests:tests/support:benchmarks python -m zoo.run --only 'timm/*' llama

`--only` takes shell patterns, and leaves docs/zoo.json as it is.

Each model has a process of its own, forked from one that has imported the libraries: what a model leaves behind goes
with it, and one that hangs or crashes takes no other along.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import hashlib
import json
import multiprocessing as mp
import os
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from speed.environment import versions
from zoo.models import named
from zoo.result import Result, summary

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "zoo" / "results.jsonl"
RECORDS = ROOT / "docs" / "zoo.json"
CONTEXT = mp.get_context("forkserver")
#: What the process imports from which all models' processes are forked.
PRELOADED = ["diffusers", "timm", "torch.export", "torchvision", "transformers", "zoo.checks", "hra_fx.api.transform"]


def work(name: str, pipe: Connection) -> None:
    """Check one model, in a process of its own."""
    import torch
    from zoo.checks import check

    faulthandler.enable()
    torch.set_num_threads(1)
    pipe.send(check(named([name])[name]))


def checked(name: str, timeout: float) -> Result:
    """The result of a process of its own."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    found = Result(name, checks={"transform": "it took too long, and was stopped"})
    try:
        if receiver.poll(timeout):
            found = receiver.recv()
            process.join(10)  # it ends by itself, and cleans up
    except EOFError:
        process.join()
        found.checks["transform"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return found


def code_version() -> str:
    """A hash of all that a result rests on."""
    digest = hashlib.sha256()
    for folder in ("hra_fx", "passes", "tests/zoo", "tests/layers", "tests/support"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".tsv"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept(file: Path, code: str) -> dict[str, Result]:
    """Results of this version of the code from earlier runs."""
    rows = map(json.loads, file.read_text().splitlines() if file.exists() else [])
    return {row["result"]["name"]: Result(**row["result"]) for row in rows if row["code"] == code}


def main() -> int:
    """Run; the exit code is 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names, or shell patterns of names")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model (default 300)")
    parser.add_argument("--resume", action="store_true", help="keep results that this very code gave before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON lines (default build/zoo/results.jsonl)")
    options = parser.parse_args()
    code, names = code_version(), list(named(options.only))
    results = {name: one for name, one in kept(options.results, code).items() if options.resume and name in names}
    left = [name for name in names if name not in results]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    CONTEXT.set_forkserver_preload(PRELOADED)
    with options.results.open("a" if options.resume else "w") as file, ThreadPool(options.jobs) as pool:
        found = pool.imap_unordered(partial(checked, timeout=options.timeout), left)
        for count, result in enumerate(found, 1):
            results[result.name] = result
            file.write(json.dumps({"code": code, "result": dataclasses.asdict(result)}) + "\n")
            file.flush()
            print(f"[{count}/{len(left)}] {result.line()}", flush=True)
    return finish([results[name] for name in names], whole=not options.only)


def finish(results: Sequence[Result], *, whole: bool) -> int:
    """Write the records of a whole run, print the summary, and give the exit code."""
    if whole:
        lines = ",\n".join(json.dumps(dataclasses.asdict(result)) for result in results)
        RECORDS.write_text(f'{{"environment": {json.dumps(versions())},\n"models": [\n{lines}\n]}}\n')
    print("", *summary(results), sep="\n")
    wrong = [result.name for result in results if not result.right]
    if wrong:
        print(f"WRONG ({len(wrong)}): {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
