"""The tables and the plot of docs/comparison.md: HRA next to the other methods of PEFT."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turns import ratio

from learning import costs
from learning.plan import SEEDS, TEACHERS, untrained
from learning.plots import LOOKS, Point, better_up_and_right, draw_panels
from learning.rates import final_runs
from learning.records import Record
from learning.summary import scores
from learning.tables import number, spread, table
from learning.tasks import TASKS
from learning.variants import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

README_TASKS = ("language", "newsgroups-1600", "newsgroups-5000", "digits")
METHODS = ("hra-pairs", "hra", "lora", "dora", "oft", "boft", "psoft", "road", "miss", "full")
TASK, KEPT = "language", ("perplexity of tales", "facts, %")
#: Method -> a method that computes the same, and has the same scores.
SAME = {"hra-peft": "hra"}
#: Colors and markers: those of other plots, and more.
MARKS = {name: look for name, look in LOOKS.items() if name != "hra-quiet"} | {
    "psoft": ("#44AA99", "h"),
    "road": ("#999933", "<"),
    "miss": ("#332288", "*"),
    "lora-protect": LOOKS["lora"],
    "hra-pairs-protect": LOOKS["hra-pairs"],
}


def write(records: Sequence[Record], folder: Path) -> None:
    """Write the plot, and the tables between their marks on the page."""
    pareto(records, folder / "comparison.svg")
    page = folder / "comparison.md"
    if page.exists():
        text = page.read_text()
        for name, made in (("scores", scores_table(records)), ("costs", costs_table(records))):
            begin, end = f"<!-- {name}: written by make bench-learning -->", f"<!-- end of {name} -->"
            text = f"{text.split(begin)[0]}{begin}\n\n{made}\n{end}{text.split(end)[1]}"
        page.write_text(text)


def scores_table(records: Sequence[Record]) -> str:
    """Test scores of five seeds, a row for each method that has some."""
    tasks = (*README_TASKS, *TEACHERS)
    columns = [
        f"[{task}](results.md#{task}), {TASKS[task].metric} {'↑' if TASKS[task].higher_is_better else '↓'}"
        for task in tasks
    ]
    rows = [
        [
            ALL[method].label,
            *(
                spread(scores(runs)) if len(runs := tested(records, task, method)) == len(SEEDS) else "-"
                for task in tasks
            ),
        ]
        for method in METHODS
    ]
    return table(["", *columns], [row for row in rows if {*row[1:]} != {"-"}])


def costs_table(records: Sequence[Record]) -> str:
    """Scores, what is kept, and costs on `language`, a row for each method, and with what the costs were measured."""
    about, measured = costs.read()
    columns = (
        "perplexity of new posts ↓",
        f"{KEPT[0]} ↓",
        f"{KEPT[1]} ↑",
        "seeds",
        "parameters",
        "time",
        "memory",
        "file",
    )
    rows = [["before training", *scored(records, untrained(TASK)), *"----"]]
    for method in costs.METHODS:
        paid = cells(measured[method]) if method in measured else ["-"] * 4
        rows.append([ALL[method].label, *scored(records, method), *paid])
    return f"{table(['', *columns], rows)}\nCosts: {about}\n"


def cells(cost: costs.Cost) -> list[str]:
    """Trained parameters, the time of a step relative to LoRA, memory and the file."""
    times = f"{ratio(cost.seconds, cost.lora):.2f}"
    return [f"{cost.trainable:,}", times, f"{cost.peak_mb or 0:,.0f} MB", f"{number(cost.file_mb)} MB"]


def scored(records: Sequence[Record], method: str) -> list[str]:
    """The score, what is kept, and the number of seeds."""
    runs = tested(records, TASK, method)
    if not runs:
        return ["-"] * 4
    kept = (spread([run.retention[name] for run in runs]) for name in KEPT)
    return [spread(scores(runs)), *kept, str(len(runs))]


def tested(records: Sequence[Record], task: str, method: str) -> list[Record]:
    """The runs of a method with the first five seeds."""
    return [run for run in final_runs(records, task, SAME.get(method, method)) if run.seed in SEEDS]


def pareto(records: Sequence[Record], file: Path) -> Path:
    """What is kept over the score, by method; a line joins the adapters that no other one beats in both."""
    return draw_panels([(name, panel(records, name)) for name in KEPT], file, "perplexity of new posts", 2, (3.6, 2.8))


def panel(records: Sequence[Record], name: str) -> Callable[[Axes], None]:
    """What is kept as `name`."""
    up = not name.startswith("perplexity")

    def draw(axes: Axes) -> None:
        points = {}
        for method, (color, marker) in MARKS.items():
            if runs := tested(records, TASK, method):
                kept = statistics.fmean(run.retention[name] for run in runs)
                points[method] = statistics.fmean(scores(runs)), kept
                size = 11 if method.endswith("-protect") else 6
                axes.plot(*points[method], color=color, marker=marker, ls="none", ms=size, label=ALL[method].label)
        adapters = [point for method, point in points.items() if method != "full"]
        best = zip(*front(adapters, up=up), strict=True)
        axes.plot(*best, color="#999999", linewidth=0.8, zorder=0, label="best adapters")
        axes.set_ylabel(name)
        better_up_and_right(axes, TASKS[TASK].higher_is_better, up)

    return draw


def front(points: Iterable[Point], *, up: bool) -> Iterator[Point]:
    """The points that no other beats in both, in the order of the score, of which less is better."""
    best: float | None = None
    for point in sorted(points, key=lambda one: (one[0], -one[1] if up else one[1])):
        value = point[1] if up else -point[1]
        if best is None or value > best:
            best = value
            yield point
