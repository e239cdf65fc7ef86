"""docs/results.md: everything on it comes from docs/results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from learning import plots
from learning.plan import TASK_NAMES, finished, methods_of, untrained
from learning.rates import chosen, final_runs
from learning.records import FILE, Record
from learning.summary import Comparison, Difference, compare, gain, retention_gain, scores, validation_gain
from learning.tasks import TASKS
from learning.variants import ALL, VARIANTS

INTRODUCTION = """\
<!-- Written by make bench-learning; do not edit. -->
# Does HRA learn as well as LoRA?

HRA and LoRA with numbers of trained parameters within 3% of each other, and full fine-tuning, over several seeds. A
seed draws the training examples, their order, the new head and the start of the adapter, and all methods share it.
"Gain" is how much better HRA's test score is than LoRA's, so more is better for every metric; the interval is that of
the paired differences, at 95%. "Closed" is the share of the distance from LoRA to full fine-tuning that HRA covers,
where this distance is larger than its interval.
[docs/training.md](training.md) says which settings follow from this.
"""

PROTOCOL = """\
## How it was measured

- Every method trains on the same examples in the same order, for the same number of steps, with AdamW, no weight decay,
  a linear schedule with 10% warmup, and gradients clipped to norm 1. A new head has one learning rate for all methods,
  except for "head only", which chooses its own.
- Each method chooses its learning rate from four, by the validation score of seed 0. Where the best of them is the
  lowest or the highest, the grid is extended by one rate, at most twice; after that, the best rate may still be the
  lowest or the highest. No seed trains on validation examples.
- Intervals cover the choice of training examples and random starts. All seeds share the test examples: one accuracy on
  1500 texts has a standard error of 1.2 points.
- The test split is read by the runs with the chosen rate, one for each seed, and by no others.
- Ranks: LoRA's is given. HRA gets the rank with the nearest number of parameters, OFT the nearest size of blocks, and
  DoRA has LoRA's rank. LoRA has `lora_alpha = 2 r`. "HRA" is `HRAConfig()` with its defaults.
- On the digits, OFT and PEFT's HRA are left out: PEFT's OFT fails for the convolutions, and its HRA takes many times as
  long there. BOFT, PSOFT and ranks that differ by layer were not compared.
- Time is CPU time on one thread of a machine that other programs shared, memory the growth of the process during
  training. Both contain the base model's forward and backward pass. [benchmarks.md](benchmarks.md) compares speed.
- In the plot over parameters, each point is the better of the chosen learning rate and the next lower one.
- Runs repeat bit for bit, except for HRA on `language`: two runs of seed 0 at 3e-3 gave validation perplexities of
  121.8 and 120.1.

To make one run again and print its record:

```
PYTHONPATH=benchmarks python -m learning --task digits --method hra --seed 0
```

`make bench-learning` makes the runs that docs/results.json lacks, two at a time, and writes this page. You can stop it,
and it continues from the records that are there. To repeat all runs, delete docs/results.json first.
"""


FORGETTING = """\
## Forgetting

What the model could do before, and still can after training at the learning rate that was chosen for the new task:
means over the seeds. "HRA over LoRA" is the paired difference with its 95% interval; more is better for every metric.

"""

FORGETTING_PLOT = """
Each curve is one method at rising learning rates, seed 0, without rates that are much too large: how well it learned
the new task, and what it retained.

![What is retained over the validation score](results_forgetting.svg)
"""

TRIALS = """\
## What helps HRA

The gain over HRA with its defaults on validation data, in points, paired over three seeds, with its 95% interval and
the learning rate that was chosen. More is better.

"""


def write_page(records: Sequence[Record], folder: Path = FILE.parent) -> None:
    """Write the page and its plots into a folder."""
    for name in ("rates", "ranks", "forgetting"):
        getattr(plots, name)(records, folder / f"results_{name}.svg")
    (folder / "results.md").write_text(page(records))


def page(records: Sequence[Record]) -> str:
    """The text of the page."""
    tasks = [task for task in TASK_NAMES if finished(records, task, "lora") and finished(records, task, "hra")]
    parts = [
        INTRODUCTION,
        _first_table([found for task in tasks if (found := compare(records, task))]),
        "![Validation scores over the learning rate](results_rates.svg)\n",
        *(_of_task(records, task) for task in tasks),
        "## Parameters\n\nValidation scores, means of three seeds.\n",
        "![Validation scores over the number of trained parameters](results_ranks.svg)\n",
        _forgetting(records, tasks),
        _trials(records),
        PROTOCOL,
        _cost(records),
        _unfinished(records),
    ]
    return "\n".join(parts)


def _first_table(found: Sequence[Comparison]) -> str:
    rows = [
        [
            f"[{row.task}](#{row.task})",
            TASKS[row.task].metric,
            str(row.seeds),
            _number(row.lora),
            _number(row.hra),
            _interval(row.gain),
            _number(row.full) if row.full is not None else "-",
            _interval(row.distance) if row.distance else "-",
            f"{100 * row.closed:.0f}%" if row.closed is not None else "-",
        ]
        for row in found
    ]
    short = [row.task for row in found if not row.holds]
    verdict = (
        f"HRA's mean falls short of LoRA's by more than one standard error of the difference on: {', '.join(short)}."
        if short
        else "HRA's mean is at least LoRA's minus one standard error of the difference on every task."
    )
    columns = ["task", "metric", "seeds", "LoRA", "HRA", "gain", "full fine-tuning", "full over LoRA", "closed"]
    return f"{_table(columns, rows)}\n{verdict}\n"


def readme_table(records: Sequence[Record]) -> str:
    """The table of README: means and standard deviations of test scores, and HRA's gain over LoRA."""
    rows = []
    for task in TASK_NAMES:
        found = compare(records, task)
        if found is None:
            continue
        metric = TASKS[task].metric + (" ↑" if TASKS[task].higher_is_better else " ↓")
        means = [_spread(scores(final_runs(records, task, method))) for method in ("lora", "hra", "full")]
        rows.append([f"[{task}](docs/results.md#{task}), {metric}", *means, _interval(found.gain)])
    return _table(["task", "LoRA", "HRA", "full fine-tuning", "gain"], rows)


def _spread(values: Sequence[float]) -> str:
    """The mean and the standard deviation."""
    if not values:
        return "-"
    spread = f" ± {_number(statistics.stdev(values))}" if len(values) > 1 else ""
    return _number(statistics.mean(values)) + spread


def _of_task(records: Sequence[Record], task: str) -> str:
    kept = plots.retained(records, task)
    rows = []
    for method in methods_of(task):
        if method in VARIANTS or not finished(records, task, method):
            continue
        runs = final_runs(records, task, method)
        first = runs[0]
        rows.append(
            [
                ALL[method].label,
                str(first.r or "-"),
                f"{first.trainable:,}",
                f"{first.lr:g}" if first.lr else "-",
                _spread(scores(runs)),
                _interval(gain(records, task, method, "lora")) if method not in ("lora", "base") else "-",
                *(_number(statistics.mean(run.retention[name] for run in runs)) for name in kept),
                f"{statistics.mean(run.seconds for run in runs):.1f} s",
                f"{statistics.mean(run.peak_mb or 0 for run in runs):.0f} MB",
            ]
        )
    columns = ["method", "r", "parameters", "rate", TASKS[task].metric, "gain over LoRA", *kept, "time", "memory"]
    return f"## {task}\n\n{TASKS[task].about}\n\n{_table(columns, rows)}"


def _forgetting(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """What is retained, by task and method."""
    methods = ("lora", "hra", "full")
    rows = []
    for task in tasks:
        for name in plots.retained(records, task):
            means = [_mean_retained(records, task, method, name) for method in (untrained(task), *methods)]
            rows.append([task, name, *means, _interval(retention_gain(records, task, "hra", "lora", name))])
    columns = ["task", "retained", "before", *(ALL[method].label for method in methods), "HRA over LoRA"]
    return FORGETTING + _table(columns, rows) + FORGETTING_PLOT


def _mean_retained(records: Sequence[Record], task: str, method: str, name: str) -> str:
    runs = final_runs(records, task, method)
    return _number(statistics.mean(run.retention[name] for run in runs)) if runs else "-"


def _trials(records: Sequence[Record]) -> str:
    """Variants of HRA: the gain over HRA on validation data, and the chosen rate."""
    tasks = [task for task in TASK_NAMES if any(finished(records, task, method) for method in VARIANTS)]
    rows = [[ALL[method].label, *(_trial(records, task, method) for task in tasks)] for method in VARIANTS]
    return TRIALS + _table(["variant", *tasks], rows)


def _trial(records: Sequence[Record], task: str, method: str) -> str:
    if not finished(records, task, method):
        return "-"
    return f"{_interval(validation_gain(records, task, method))}, {chosen(records, task, method):g}"


def _cost(records: Sequence[Record]) -> str:
    hours = sum(record.seconds for record in records) / 3600
    return (
        f"The {len(records)} runs trained for {hours:.1f} hours of CPU time in all, which two cores share; evaluations "
        "come on top.\n"
    )


def _unfinished(records: Sequence[Record]) -> str:
    """The methods that the plan has, and that lack runs."""
    missing = {
        task: [ALL[method].label for method in methods_of(task) if not finished(records, task, method)]
        for task in TASK_NAMES
    }
    lines = [f"- `{task}`: {', '.join(labels)}\n" for task, labels in missing.items() if labels]
    return f"Planned, and not finished yet:\n\n{''.join(lines)}" if lines else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _interval(value: Difference) -> str:
    mean = _number(value.mean, sign="+")
    return mean if math.isnan(value.half) else f"{mean} ± {_number(value.half)}"


def _number(value: float, sign: str = "") -> str:
    """One decimal, or two for values below 10, where errors of less than a percent have to show."""
    return f"{value:{sign}.{1 if abs(value) >= 10 else 2}f}"
