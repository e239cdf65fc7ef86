"""Tables of the records in Markdown: each method on a task, and README's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from learning.keeping import ALL
from learning.rates import final_runs
from learning.records import Record
from learning.summary import Difference, gain, scores
from learning.tasks import TASKS

#: The seeds of most methods.
SEEDS = range(5)
MAIN_TASKS = ("language", "newsgroups-1600", "newsgroups-5000", "digits")


def label(method: str) -> str:
    """The name of a method, with `@scale` for a trained model that keeps a part of its change."""
    name, _, scale = method.partition("@")
    return ALL[name].label + (f", scaled by {scale}" if scale else "")


def task_table(records: Sequence[Record], task: str) -> str:
    """A row for each method that was tested on a task: its size and rate, its score, what it retains, and its costs."""
    tested = {run.method: None for run in records if run.task == task and run.test is not None}
    rows, names = [], list[str]()
    for method in tested:
        runs = [run for run in final_runs(records, task, method) if run.seed in SEEDS]
        if runs:
            names = names or list(runs[0].retention)
            rows.append([label(method), *_cells(records, runs, names)])
    heads = [f"{name} {'↓' if name.startswith('perplexity') else '↑'}" for name in names]
    score = f"{TASKS[task].metric} {'↑' if TASKS[task].higher_is_better else '↓'}"
    return table(
        ["method", "r", "parameters", "rate", "seeds", score, "gain over LoRA", *heads, "time", "memory"], rows
    )


def _cells(records: Sequence[Record], runs: Sequence[Record], names: Sequence[str]) -> list[str]:
    first = runs[0]
    over = gain(records, first.task, first.method, "lora") if first.method not in ("lora", "base") else None
    return [
        str(first.r or "-"),
        f"{first.trainable:,}",
        f"{first.lr:g}" if first.lr else "-",
        str(len(runs)),
        spread(scores(runs)),
        interval(over) if over else "-",
        *(spread(scores(runs, name)) for name in names),
        f"{statistics.mean(run.seconds for run in runs):.1f} s",
        f"{statistics.mean(run.peak_mb or 0 for run in runs):.0f} MB",
    ]


def language_table(records: Sequence[Record]) -> str:
    """Scores, gains over LoRA, and what is kept on `language`, of all seeds."""
    rows, kept = [], ("perplexity of tales", "facts, %")
    for method in ("base", "lora", "dora", "oft", "hra", "hra-pairs", "full"):
        runs = final_runs(records, "language", method)
        over = "-" if method in ("base", "lora") else interval(gain(records, "language", method, "lora"))
        cells = [f"{runs[0].lr:g}" if runs[0].lr else "-", spread(scores(runs)), over]
        rows.append([label(method), *cells, *(spread(scores(runs, name)) for name in kept)])
    return table(["method", "rate", "perplexity ↓", "gain", "perplexity of tales ↓", "facts, % ↑"], rows)


def tasks_table(records: Sequence[Record]) -> str:
    """Test scores and gains over LoRA, a row for each task."""
    rows = []
    for task in MAIN_TASKS:
        runs = {method: final_runs(records, task, method) for method in ("lora", "hra-pairs", "hra", "full")}
        pairs, vectors = (interval(gain(records, task, method, "lora")) for method in ("hra-pairs", "hra"))
        lora, hra_pairs, hra, full = (spread(scores(found)) for found in runs.values())
        name = f"[{task}](#{task}), {TASKS[task].metric} {'↑' if TASKS[task].higher_is_better else '↓'}"
        rows.append([name, lora, hra_pairs, pairs, hra, vectors, full])
    return table(["task", "LoRA", "HRA, pairs", "gain", "HRA, vectors", "gain", "full fine-tuning"], rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with numbers in all columns but the first."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float]) -> str:
    """The mean and the standard deviation."""
    if not values:
        return "-"
    return number(statistics.mean(values)) + (f" ± {number(statistics.stdev(values))}" if len(values) > 1 else "")


def interval(found: Difference) -> str:
    """A difference and half of its 95% interval."""
    mean = number(found.mean, sign="+")
    return mean if math.isnan(found.half) else f"{mean} ± {number(found.half)}"


def number(value: float, sign: str = "") -> str:
    """One decimal, or two for values below 10, where errors of less than a percent have to show."""
    return f"{value:{sign}.{1 if abs(value) >= 10 else 2}f}"
