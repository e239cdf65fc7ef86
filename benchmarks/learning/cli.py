"""`python -m learning`: one run, or all that are planned."""

from __future__ import annotations

import argparse
import dataclasses
import json

from learning.page import write_page
from learning.plan import TASK_NAMES
from learning.rates import chosen
from learning.records import read
from learning.running import run_all
from learning.tasks import TASKS
from learning.training import run
from learning.variants import ALL


def main() -> int:
    """Print the record of one run as JSON, or make the runs that docs/results.json lacks and write docs/results.md."""
    parser = argparse.ArgumentParser(prog="learning", description=main.__doc__)
    parser.add_argument("--task", choices=TASKS, help="only this task")
    parser.add_argument("--method", choices=ALL, help="one run of this method; needs --task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="learning rate (default: the one that docs/results.json chose)")
    parser.add_argument("--r", type=int, help="rank (default: as many parameters as LoRA)")
    parser.add_argument("--float32", action="store_true", help="compute nothing in bfloat16")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, with one thread each (default 2)")
    parser.add_argument("--page", action="store_true", help="only write the pages")
    options = parser.parse_args()
    if options.method is None:
        if not options.page:
            run_all([options.task] if options.task else TASK_NAMES, options.jobs)
        write_page(read())
        return 0
    if options.task is None:
        parser.error("--method needs --task")
    lr = chosen(read(), options.task, options.method) if options.lr is None else options.lr
    record = run(options.task, options.method, options.seed, lr, r=options.r, test=True, float32=options.float32)
    print(json.dumps(dataclasses.asdict(record)))
    return 0
