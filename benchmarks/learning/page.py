"""docs/results.md: everything on it comes from docs/results.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from learning import comparison, forgiving, kept, plots, readme_plot, sequence
from learning.plan import (
    ONE_SEED,
    RANKS,
    TASK_NAMES,
    finished,
    methods_of,
    missing_ranks,
    untrained,
)
from learning.rates import RATES_FROM, final_runs
from learning.records import FILE, Record, of
from learning.summary import (
    at_equal_score,
    compare,
    difference,
    gain,
    retention_gain,
    scores,
    validation_gain,
)
from learning.tables import interval, number, spread, table
from learning.tasks import TASKS
from learning.variants import ALL, VARIANTS, VARIED_TASK

INTRODUCTION = """\
<!-- Written by make bench-learning; do not edit. -->
# Does HRA learn as well as LoRA?

HRA and LoRA are compared at equal size: their numbers of trained parameters differ by at most 3%. Each method uses
the learning rate that was best on validation data, except on `language-4-passes` and `language-4-bit`. "HRA, pairs"
is HRA with `hra_fx.train_pairs`. "HRA, vectors" is HRA without it, as in PEFT. A seed determines the training
examples, their order, the new head and the initial adapter, and is the same for all methods. Scores are on test data:
mean and standard deviation over the seeds. "Gain" is how much better a method is than LoRA, so more is better for
every metric, with the 95% interval of the paired differences.
[docs/training.md](training.md) recommends settings based on these results.
"""

PROTOCOL = """\
## How it was measured

- Every method trains on the same examples in the same order, for the same number of steps, with AdamW, no weight decay,
  a linear schedule with 10% warmup, and gradients clipped to norm 1. A new head has one learning rate for all methods,
  except for "head only", which chooses its own.
- The learning rate of each method is chosen by validation scores. Seed 0 tries four rates (LoRA and pairs try eight on
  `language` and `newsgroups-1600`), and then at most six more around the best one, in the steps 1, 1.7, 3, 5.5, 10.
  Seeds 1 and 2 also try the best rate and its neighbors, and the mean of the three seeds decides. For full fine-tuning
  and PEFT's methods other than LoRA, seed 0 decides alone on these two tasks. `language-float32` uses the rates of
  `language`, and `newsgroups-5000` those of `newsgroups-1600`. On `language-4-passes` and `language-4-bit`, all methods
  have the best rate of LoRA. No seed trains on validation examples.
- `difference` of pairs is 0.1, which was chosen on validation data of `language`.
- Intervals include the choice of training examples and the random initial values. All seeds use the same test
  examples: an accuracy on 1500 texts has a standard error of 1.2 points.
- Test scores are not used for any choice. Only the test scores of the chosen rate are shown.
- LoRA has `lora_alpha = 2 r`, and DoRA has LoRA's rank. HRA, PSOFT and MiSS have the rank, and OFT and BOFT the block
  size, with the nearest number of parameters. BOFT has one butterfly factor. RoAd is PEFT's default, which is smaller.
- For text on CPUs with instructions for bfloat16, products with the weights of the base model are in bfloat16.
  Everything else is in float32: adapters, their products and optimizers. Newer records contain the dtype of these
  products. With `--float32`, a run does not use bfloat16.
- The runs are from several machines. On `language`, LoRA, HRA in pairs and all protected methods ran on one of them,
  and DoRA, OFT, "HRA, vectors" and full fine-tuning on another one, so the differences of these four to LoRA are less
  exact than their intervals.
- `digits` does not include OFT and PEFT's HRA: PEFT's OFT fails for the convolutions, and its HRA takes many times as
  long. BOFT, PSOFT, RoAd and MiSS are compared on teachers only: a run of PEFT's BOFT on `language` would take more
  than 15 minutes, and the other three were not run there. Ranks that differ by layer were not compared.
- Time is CPU time on one thread, and is shown for runs that compute like LoRA's: in bfloat16 or not. Other programs ran
  at the same time. Memory is the growth of the process during training. Both include the base model's forward and
  backward pass. [benchmarks.md](benchmarks.md) compares speed.
- In the plot over parameters, each point is the better of the chosen learning rate and the next lower one.
- Each record in docs/results.json contains the commit of the code that created it. The commit dbc1003 is not in the
  repository.
- On `language`, the initial adapter did not depend on the seed before commit 82669ac. If you repeat an older run, its
  numbers differ.

To repeat one run and print its record:

```
PYTHONPATH=benchmarks python -m learning --task digits --method hra-pairs --seed 0
```

`make bench-learning` runs everything that is missing in docs/results.json, two runs at a time, and writes this page. If
you stop it, the next call continues from the existing records. To repeat all runs, delete docs/results.json first.
"""


FORGETTING = """\
## Forgetting

How well the model does its original task before training, and after training at the learning rate that was chosen for
the new task: means over the seeds. The last column is the paired difference with its 95% interval; more is better for
every metric.

"""

FORGETTING_PLOT = """
Each curve shows one method at increasing learning rates, with seed 0 and without rates that are much too large: how
well it learned the new task, and what it retained.

![What is retained over the validation score](results_forgetting.svg)
"""

AT_EQUAL_SCORE = """
What LoRA and pairs retain at the same validation score on the new task: means of at most three seeds. The score is the
worse of the two scores at the chosen rates with this seed. The value of the other method is interpolated on its curve,
between two learning rates. The last column is the paired difference with its 95% interval; more is better.

"""

PASSES = """\
## Several passes

Validation over training loss on `language-4-passes`. Each curve shows one method at one learning rate, from its first
pass over the posts to its fourth. Large marks are means over seeds, small marks are single seeds.

![Validation perplexity over the training loss](results_passes.svg)
"""

PARAMETERS = """\
## Parameters

Validation scores: means of three seeds for the teachers, and, if it is shown, one seed for `language`.

![Validation scores over the number of trained parameters](results_ranks.svg)
"""

TRIALS = """\
## Settings

The effect of another setting when HRA trains in pairs, at the same learning rate: the gain on validation data in
points, paired over three seeds, with its 95% interval. More is better.

"""


def write_page(records: Sequence[Record], folder: Path = FILE.parent) -> None:
    """Write the page, its plots, the picture of README.md, and what docs/comparison.md has of them into a folder."""
    drawn = [name for name in ("ranks", "passes", "kept", "forgiving") if _has(records, name)]
    for name in ("rates", "forgetting", *drawn):
        getattr(plots, name)(records, folder / f"results_{name}.svg")
    if _has(records, "kept"):
        readme_plot.write_both(records, folder)
    (folder / "results.md").write_text(page(records))
    comparison.write(records, folder)


def page(records: Sequence[Record]) -> str:
    """The text of the page."""
    tasks = [task for task in TASK_NAMES if finished(records, task, "lora") and finished(records, task, "hra-pairs")]
    parts = [
        INTRODUCTION,
        _first_table(records, tasks),
        "## Learning rates\n",
        "![Validation scores over the learning rate](results_rates.svg)\n",
        *(_of_task(records, task) for task in tasks),
        *([PASSES] if _has(records, "passes") else []),
        *([PARAMETERS] if _has(records, "ranks") else []),
        _forgetting(records, tasks),
        *([text] if (text := kept.section(records, tasks)) else []),
        *([text] if (text := sequence.section(sequence.read())) else []),
        *([text] if (text := forgiving.section(records)) else []),
        *([_trials(records)] if any(finished(records, VARIED_TASK, name) for name in VARIANTS) else []),
        PROTOCOL,
        _cost(records),
        _unfinished(records),
    ]
    return "\n".join(parts)


def _has(records: Sequence[Record], plot: str) -> bool:
    """Whether the runs of a plot are there."""
    if plot == "passes":
        return all(of(records, plots.PASSES, method) for method in ("lora", "hra-pairs"))
    if plot == "forgiving":
        return bool(forgiving.section(records))
    return bool(plots.kept_tasks(records) if plot == "kept" else plots.ranked(records))


def _first_table(records: Sequence[Record], tasks: Sequence[str]) -> str:
    found = [row for task in tasks if (row := compare(records, task))]
    short = [row.task for row in found if row.task not in ONE_SEED and not row.holds]
    verdict = (
        f"In pairs, HRA's mean is worse than LoRA's by more than one standard error of the difference on: "
        f"{', '.join(short)}."
        if short
        else "In pairs, HRA's mean is at least LoRA's minus one standard error of the difference on every task."
    )
    return f"{results_table(records, tasks, '')}\n{verdict}\n"


def results_table(records: Sequence[Record], tasks: Sequence[str], link: str) -> str:
    """Test scores and gains over LoRA, a row for each task.

    Args:
        records: the records.
        tasks: names of tasks.
        link: the address of this page.
    """
    rows = []
    for task in tasks:
        pairs, vectors = compare(records, task), compare(records, task, "hra")
        if pairs is None:
            continue
        rows.append(
            [
                f"[{task}]({link}#{task}), {TASKS[task].metric} {'↑' if TASKS[task].higher_is_better else '↓'}",
                spread(pairs.lora),
                spread(pairs.other),
                interval(pairs.gain),
                spread(vectors.other) if vectors else "-",
                interval(vectors.gain) if vectors else "-",
                spread(scores(final_runs(records, task, "full"))),
            ]
        )
    return table(["task", "LoRA", "HRA, pairs", "gain", "HRA, vectors", "gain", "full fine-tuning"], rows)


def readme_table(records: Sequence[Record]) -> str:
    """The table of README."""
    return results_table(records, comparison.README_TASKS, "docs/results.md")


def _of_task(records: Sequence[Record], task: str) -> str:
    kept = plots.retained(records, task)
    dtype = final_runs(records, task, "lora")[0].dtype
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
                spread(scores(runs)),
                interval(gain(records, task, method, "lora")) if method not in ("lora", "base") else "-",
                *(number(statistics.mean(run.retention[name] for run in runs)) for name in kept),
                f"{statistics.mean(run.seconds for run in runs):.1f} s" if first.dtype == dtype else "-",
                f"{statistics.mean(run.peak_mb or 0 for run in runs):.0f} MB",
            ]
        )
    columns = ["method", "r", "parameters", "rate", TASKS[task].metric, "gain over LoRA", *kept, "time", "memory"]
    curve = _curve(records, task) if task in ONE_SEED else ""
    return f"## {task}\n\n{TASKS[task].about}\n\n{table(columns, rows)}{curve}"


def _curve(records: Sequence[Record], task: str) -> str:
    """The validation scores of LoRA and of pairs over the steps of long runs, at each learning rate."""
    found = [run for method in ("lora", "hra-pairs") for run in of(records, task, method)]
    runs = sorted(found, key=lambda run: (run.method != "lora", run.lr))
    rows = [[ALL[run.method].label, f"{run.lr:g}", *(f"{point[2]:.1f}" for point in run.curve)] for run in runs]
    columns = ["method", "rate", *(str(point[0]) for point in runs[0].curve)]
    return f"\nValidation {TASKS[task].metric} by number of steps:\n\n{table(columns, rows)}"


def _forgetting(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """What is retained, by task and method."""
    methods = ("lora", "hra-pairs", "hra", "full")
    rows, at_equal_score = [], []
    for task in tasks:
        for name in plots.retained(records, task):
            means = [
                _mean_retained(records, _measured(records, task), untrained(task), name),
                *(_mean_retained(records, task, method, name) for method in methods),
            ]
            rows.append([task, name, *means, interval(retention_gain(records, task, "hra-pairs", "lora", name))])
            if task not in RATES_FROM:  # which have runs at other rates
                at_equal_score.append([task, name, *_at_equal_score(records, task, name)])
    columns = ["task", "retained", "before", *(ALL[method].label for method in methods), "pairs over LoRA"]
    return (
        FORGETTING
        + table(columns, rows)
        + FORGETTING_PLOT
        + AT_EQUAL_SCORE
        + table(["task", "retained", "validation score", "LoRA", "HRA, pairs", "pairs over LoRA"], at_equal_score)
    )


def _at_equal_score(records: Sequence[Record], task: str, name: str) -> list[str]:
    """The score, what LoRA and pairs retain at it, and the difference."""
    if not (found := at_equal_score(records, task, name)):
        return ["-"] * 4
    means = [number(statistics.mean(column)) for column in zip(*found, strict=True)]
    sign = -1 if name.startswith("perplexity") else 1
    lora, pairs = ({seed: sign * kept[place] for seed, kept in enumerate(found)} for place in (1, 2))
    return [*means, interval(difference(pairs, lora))]


def _measured(records: Sequence[Record], task: str) -> str:
    """The task on which the model before training was measured."""
    return task if of(records, task, untrained(task)) else RATES_FROM[task]


def _mean_retained(records: Sequence[Record], task: str, method: str, name: str) -> str:
    runs = final_runs(records, task, method)
    return number(statistics.mean(run.retention[name] for run in runs)) if runs else "-"


def _trials(records: Sequence[Record]) -> str:
    """Variants of the training: the gain over its defaults on validation data."""
    rows = [[ALL[method].label, _trial(records, VARIED_TASK, method)] for method in VARIANTS]
    return TRIALS + table(["setting", VARIED_TASK], rows)


def _trial(records: Sequence[Record], task: str, method: str) -> str:
    return interval(validation_gain(records, task, method)) if finished(records, task, method) else "-"


def _cost(records: Sequence[Record]) -> str:
    hours = sum(record.seconds for record in records) / 3600
    return f"The {len(records)} runs trained for {hours:.1f} hours of CPU time in total, without evaluations.\n"


def _unfinished(records: Sequence[Record]) -> str:
    """The methods that the plan has, and that lack runs; and those that lack ranks."""
    missing = {
        task: [ALL[method].label for method in methods_of(task) if not finished(records, task, method)]
        + [f"ranks of {ALL[method].label}" for method in RANKS.get(task, {}) if missing_ranks(records, task, method)]
        for task in TASK_NAMES
    }
    lines = [f"- `{task}`: {', '.join(labels)}\n" for task, labels in missing.items() if labels]
    return f"Planned, but not finished yet:\n\n{''.join(lines)}" if lines else ""
