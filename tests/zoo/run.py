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
TIMEOUT = 300  # seconds for one model
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


def checked(name: str) -> Result:
    """The result of a process of its own."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=work, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    found = Result(name, checks={"transform": "it took too long, and was stopped"})
    try:
        if receiver.poll(TIMEOUT):
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


def kept(code: str) -> dict[str, Result]:
    """Results of this version of the code from earlier runs."""
    rows = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else [])
    return {row["result"]["name"]: Result(**row["result"]) for row in rows if row["code"] == code}


def main() -> int:
    """Run, write the records of a whole run, and print a summary; the exit code is 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names, or shell patterns of names")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--resume", action="store_true", help="keep results that this very code gave before")
    options = parser.parse_args()
    code, names = code_version(), list(named(options.only))
    found = {name: one for name, one in kept(code).items() if options.resume and name in names}
    left = [name for name in names if name not in found]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    CONTEXT.set_forkserver_preload(PRELOADED)
    with RESULTS.open("a" if options.resume else "w") as file, ThreadPool(options.jobs) as pool:
        for count, result in enumerate(pool.imap_unordered(checked, left), 1):
            found[result.name] = result
            print(json.dumps({"code": code, "result": dataclasses.asdict(result)}), file=file, flush=True)
            print(f"[{count}/{len(left)}] {result.line()}", flush=True)
    results = [found[name] for name in names]
    if not options.only:
        lines = ",\n".join(json.dumps(dataclasses.asdict(result)) for result in results)
        RECORDS.write_text(f'{{"environment": {json.dumps(versions())},\n"models": [\n{lines}\n]}}\n')
    wrong = [result.name for result in results if result.failures]
    print("", *summary(results), f"WRONG ({len(wrong)}): {', '.join(wrong)}" if wrong else "", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
