"""The part of docs/results.md on protection and rehearsal: what each method keeps."""

from __future__ import annotations

from collections.abc import Sequence

from learning import plots
from learning.keeping import CONTROLS, KEEPING
from learning.plan import SEEDS, finished, methods_of, untrained
from learning.rates import final_runs
from learning.records import Record
from learning.summary import Difference, difference, scores
from learning.tables import interval, spread, table
from learning.tasks import TASKS
from learning.variants import ALL, BASE_OF

INTRODUCTION = """\
## Keep what the model knows

"Protected" methods keep their vectors orthogonal to the main directions of the inputs of 64 samples of what must be
kept (`hra_fx.protect`, 16 directions for each layer). For LoRA, the benchmark does the same with the rows of `A`. With
"rehearsal", a batch of these samples follows every nine batches of the new task. None of the samples is tested. Each
method has the learning rate of the same method without protection.
"""
PLOT = """
Means over the seeds; up and right is better. A line leads from each method to the protected one, the large mark.

![What is kept over the test score](results_kept.svg)
"""
ON_MEANS = """Means and standard deviations over {seeds} seeds:

"""
ON_GAINS = """
Paired differences to the same method without protection, with their 95% intervals; more is better for every metric:

"""
ON_CONTROLS = """
Other choices, with three seeds: differences to {base} with the same seeds. "80% of the energy" takes as many directions
for each layer as hold 80% of the energy of its inputs: one in some layers, hundreds in others. "Other samples" are
tweets in place of tales. "Low directions of W" starts the pairs in the tenth of the directions with the smallest
singular values of the weight.

"""


def section(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """The text; empty while no runs are there."""
    parts = [_of_task(records, task) for task in tasks if _kept(records, task, KEEPING)]
    picture = PLOT if plots.kept_tasks(records) else ""
    return "\n".join([INTRODUCTION + picture, *parts]) if parts else ""


def _kept(records: Sequence[Record], task: str, methods: dict[str, tuple[str, object]]) -> list[str]:
    """The methods of a task that are finished, each after the one that it changes."""
    done = [name for name in methods_of(task) if name in methods and finished(records, task, name)]
    bases = list(dict.fromkeys(BASE_OF[name] for name in done))
    return [name for base in bases for name in (base, *(one for one in done if BASE_OF[one] == base))]


def _names(records: Sequence[Record], task: str) -> list[str]:
    """What is retained."""
    return list(final_runs(records, task, "lora")[-1].retention)


def _of_task(records: Sequence[Record], task: str) -> str:
    names, methods = _names(records, task), _kept(records, task, KEEPING)
    columns = ["method", TASKS[task].metric, *names]
    means = table(columns, [_means(records, task, method, names) for method in (untrained(task), *methods)])
    gains = table(columns, [_gains(records, task, method, names) for method in methods if method in BASE_OF])
    controls = [_gains(records, task, method, names) for method in _kept(records, task, CONTROLS) if method in CONTROLS]
    text = f"### {task}: what is kept\n\n{ON_MEANS.format(seeds=len(SEEDS))}{means}{ON_GAINS}{gains}"
    return text + (ON_CONTROLS.format(base=ALL["hra-pairs"].label) + table(columns, controls) if controls else "")


def _means(records: Sequence[Record], task: str, method: str, names: Sequence[str]) -> list[str]:
    """Means and standard deviations."""
    runs = [run for run in final_runs(records, task, method) if run.seed in SEEDS]
    kept = (spread([run.retention[name] for run in runs]) for name in names)
    return [ALL[method].label, spread(scores(runs)), *kept]


def _gains(records: Sequence[Record], task: str, method: str, names: Sequence[str]) -> list[str]:
    """The paired differences of a method to the one that it changes."""
    gains = (gain_over_base(records, task, method, name) for name in ("", *names))
    return [ALL[method].label, *map(interval, gains)]


def gain_over_base(records: Sequence[Record], task: str, method: str, name: str = "") -> Difference:
    """The paired gain of a method over the one that it changes, in the test score or in what is retained as `name`."""
    up = TASKS[task].higher_is_better if not name else not name.startswith("perplexity")
    values = [
        {run.seed: (1 if up else -1) * _value(run, name) for run in final_runs(records, task, one)}
        for one in (method, BASE_OF[method])
    ]
    return difference(*values)


def _value(run: Record, name: str) -> float:
    assert run.test is not None
    return run.retention[name] if name else run.test


def guide_table(records: Sequence[Record]) -> str:
    """The table of docs/training.md: means and standard deviations."""
    task = "language"
    names = _names(records, task)
    methods = ("lora", "lora-protect", "lora-rehearse", "hra-pairs", "hra-pairs-protect", "hra-pairs-rehearse")
    rows = [_means(records, task, method, names) for method in (untrained(task), *methods)]
    columns = ("perplexity of new posts", *names)
    return table(["", *(f"{name} {'↓' if name.startswith('perplexity') else '↑'}" for name in columns)], rows)
