"""The plots of docs/results.md: validation scores, and what is retained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from hra_fx.reporting.plots import GRID, INK, QUIET, new_figure, style, write
from learning import forgiving as wrong_rates
from learning.plan import RANK_SEEDS, RANKS, SEEDS, TASK_NAMES, finished, methods_of, untrained
from learning.rates import RATES_FROM, below, chosen, final_runs, searched
from learning.records import Record, matched_rank, of
from learning.tasks import TASKS
from learning.variants import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

#: Okabe and Ito's colors, which people with color vision deficiency can tell apart; the markers differ too.
LOOKS = {
    "full": ("#000000", "x"),
    "head": ("#999999", "|"),
    "oft": ("#E69F00", "^"),
    "dora": ("#009E73", "s"),
    "lora": ("#0072B2", "D"),
    "lora-alpha-r": ("#6FA8DC", "d"),
    "hra-gs": ("#56B4E9", "v"),
    "hra": ("#CC79A7", "P"),
    "hra-pairs": ("#D55E00", "o"),
    "hra-quiet": ("#882255", "p"),
}
#: The task whose training is drawn pass by pass.
PASSES = "language-4-passes"
#: The methods that are drawn with protection and without.
KEPT_METHODS = ("lora", "hra-pairs")
# In inches.
WIDE, HIGH, GAP, ABOVE, BELOW = 2.5, 1.9, 0.6, 0.7, 0.75

Point = tuple[float, float]
Panel = tuple[str, Callable[["Axes"], None]]


def rates(records: Sequence[Record], file: Path) -> Path:
    """Validation scores over the learning rate, a panel for each task."""
    tasks = [task for task in TASK_NAMES if task not in RATES_FROM and of(records, task, "hra-pairs")]
    panels = [(task, _rates_panel(records, task)) for task in tasks]
    return draw_panels(panels, file, "learning rate")


def ranks(records: Sequence[Record], file: Path) -> Path:
    """Validation scores over the number of trained parameters, a panel for each task."""
    panels = [(task, _ranks_panel(records, task)) for task in ranked(records)]
    return draw_panels(panels, file, "trained parameters")


def ranked(records: Sequence[Record]) -> list[str]:
    """The tasks whose runs over ranks are there."""
    return [
        task
        for task, methods in RANKS.items()
        if all(searched(records, task, method) for method in methods)
        and all(len(by_size(records, task, method)) == len(ranks) for method, ranks in methods.items())
    ]


def forgetting(records: Sequence[Record], file: Path) -> Path:
    """What is retained over the validation score, a point for each learning rate."""
    panels = [
        (f"{task}: {name}", _forgetting_panel(records, task, name))
        for task in TASK_NAMES
        if task not in RATES_FROM  # they have one learning rate
        for name in retained(records, task)
    ]
    return draw_panels(panels, file, "validation score of the new task")


def kept(records: Sequence[Record], file: Path) -> Path:
    """What is retained over the test score: a line from each method to the one that is protected, and rehearsal."""
    panels = [
        (f"{task}: {name}", _kept_panel(records, task, name))
        for task in kept_tasks(records)
        for name in final_runs(records, task, "lora")[-1].retention
    ]
    return draw_panels(panels, file, "test score of the new task")


def kept_tasks(records: Sequence[Record]) -> list[str]:
    """The tasks whose protected methods are finished."""
    return [task for task in TASK_NAMES if all(finished(records, task, f"{one}-protect") for one in KEPT_METHODS)]


def _kept_panel(records: Sequence[Record], task: str, name: str) -> Callable[[Axes], None]:
    def mark(axes: Axes, method: str, look: str, size: float, fill: str | None = None) -> Point:
        runs = [run for run in final_runs(records, task, method) if run.seed in SEEDS]
        kept = statistics.fmean(run.retention[name] for run in runs)
        point = statistics.fmean(run.test for run in runs if run.test is not None), kept
        color, marker = LOOKS[look]
        shape = {"marker": marker, "markersize": size, "markerfacecolor": fill or color, "linestyle": "none"}
        axes.plot(*point, color=color, label=ALL[method].label, **shape)
        return point

    def draw(axes: Axes) -> None:
        for method in KEPT_METHODS:
            start = mark(axes, method, method, 4.5)
            end = mark(axes, f"{method}-protect", method, 9)
            axes.annotate("", end, start, arrowprops={"arrowstyle": "-", "color": LOOKS[method][0]})
            if finished(records, task, f"{method}-rehearse"):
                mark(axes, f"{method}-rehearse", method, 6, fill="none")
        before = statistics.fmean(run.retention[name] for run in final_runs(records, task, untrained(task)))
        axes.axhline(before, color=QUIET, linewidth=0.8, linestyle=":", label="before training")
        axes.set_ylabel(name)
        better_up_and_right(axes, TASKS[task].higher_is_better, not name.startswith("perplexity"))

    return draw


def better_up_and_right(axes: Axes, across: bool, up: bool) -> None:
    """Turn the axes whose smaller values are better."""
    if not across:
        axes.invert_xaxis()
    if not up:
        axes.invert_yaxis()


def forgiving(records: Sequence[Record], file: Path) -> Path:
    """How much of the best rate's gain each rate gives, a panel for each task."""

    def panel(task: str, methods: Sequence[str]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for method in LOOKS:
                if method in methods and (parts := wrong_rates.lost(records, task, method)):
                    _curve(axes, method, [(lr, 100 * (1 - part)) for lr, part in parts.items()])
            _logarithmic(axes, wrong_rates.RATES[::2])
            axes.set_xticks(wrong_rates.RATES[::2], [f"{lr:g}" for lr in wrong_rates.RATES[::2]])
            axes.set_ylabel("share of the best gain, %")

        return draw

    panels = [(task, panel(task, methods)) for task, (_, methods) in wrong_rates.PLAN.items()]
    return draw_panels(panels, file, "learning rate")


def passes(records: Sequence[Record], file: Path) -> Path:
    """Validation scores over the training loss, a curve for each method and learning rate."""

    def draw(axes: Axes) -> None:
        for method in _drawn(PASSES):
            rank = matched_rank(records, PASSES, method)
            own = [run for run in of(records, PASSES, method) if run.r == rank]
            for lr in sorted({run.lr for run in own}):
                runs = [run for run in own if run.lr == lr]
                curves = list({run.seed: run.curve for run in runs}.values())
                means = [
                    [statistics.mean(column) for column in zip(*points, strict=True)]
                    for points in zip(*curves, strict=True)
                ]
                _curve(axes, method, [(loss, score) for _, loss, score in means], large=len(curves) > 1)
                axes.annotate(
                    f"{lr:g}", means[-1][1:], fontsize=7, color=QUIET, xytext=(4, 2), textcoords="offset points"
                )
        axes.invert_xaxis()
        axes.set_ylabel(f"validation {TASKS[PASSES].metric}")

    return draw_panels([(PASSES, draw)], file, "training loss", columns=1, size=(6.0, 3.4))


def retained(records: Sequence[Record], task: str) -> list[str]:
    """The names of what a task's models retain."""
    return list(next((record.retention for record in of(records, task, "lora")), {}))


def _rates_panel(records: Sequence[Record], task: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for method in _drawn(task):
            _curve(axes, method, list(searched(records, task, method).items()))
        _logarithmic(
            axes, sorted({lr for line in axes.get_lines() for lr in line.get_xdata() if f"{lr:.1e}"[:3] == "1.0"})
        )
        axes.set_ylabel(f"validation {TASKS[task].metric}")
        _limit(axes, records, task)
        if TASKS[task].metric == "perplexity":
            axes.set_yscale("log")
            _plain(axes.yaxis)

    return draw


def _plain(axis: Axis) -> None:
    """Perplexities as plain numbers on a logarithmic axis."""
    axis.set_major_locator(FixedLocator([50, 100, 150, 200, 300, 400]))
    axis.set_major_formatter(FormatStrFormatter("%d"))
    axis.set_minor_locator(NullLocator())


def _limit(axes: Axes, records: Sequence[Record], task: str) -> None:
    """Cut off the scores of rates that are much too large."""
    scores = [score for method in _drawn(task) for score in searched(records, task, method).values()]
    bound = _bound(records, task)
    if TASKS[task].higher_is_better:
        axes.set_ylim(bottom=bound)
    else:
        axes.set_ylim(bottom=min(scores) - 0.05 * (bound - min(scores)), top=bound)


def _bound(records: Sequence[Record], task: str) -> float:
    """A score a little worse than that of every method at its lowest rate."""
    firsts = [list(searched(records, task, method).values())[:1] for method in _drawn(task)]
    values = [first[0] for first in firsts if first]
    return min(values) - 2 if TASKS[task].higher_is_better else 1.1 * max(values)


def _ranks_panel(records: Sequence[Record], task: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for method in RANKS[task]:
            if of(records, task, method):
                _curve(axes, method, by_size(records, task, method))
        _logarithmic(axes, [size for line in axes.get_lines()[-1:] for size in line.get_xdata()])
        axes.set_ylabel(f"validation {TASKS[task].metric}")

    return draw


def _logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at some ticks."""
    axes.set_xscale("log")
    steps = [next((step for step in (10**6, 10**3) if tick >= step), 1) for tick in ticks]
    letters = {1: "", 10**3: "k", 10**6: "M"}
    axes.set_xticks(ticks, [f"{tick / step:.3g}{letters[step]}" for tick, step in zip(ticks, steps, strict=True)])
    axes.minorticks_off()


def by_size(records: Sequence[Record], task: str, method: str) -> list[Point]:
    """Trained parameters, and the mean validation score at the better of two learning rates, in rising order."""
    sign = 1 if TASKS[task].higher_is_better else -1
    lr = chosen(records, task, method)
    found: dict[int, dict[float, dict[int, float]]] = {}
    for record in of(records, task, method):
        if record.lr in (lr, below(lr)) and record.seed in RANK_SEEDS[task]:
            found.setdefault(record.trainable, {}).setdefault(record.lr, {})[record.seed] = record.validation
    whole = len(RANK_SEEDS[task])
    means = {
        size: [sign * statistics.mean(by_seed.values()) for by_seed in rates.values() if len(by_seed) == whole]
        for size, rates in found.items()
    }
    return [(size, sign * max(values)) for size, values in sorted(means.items()) if values]


def _forgetting_panel(records: Sequence[Record], task: str, name: str) -> Callable[[Axes], None]:
    sign = 1 if TASKS[task].higher_is_better else -1

    def draw(axes: Axes) -> None:
        bound = _bound(records, task)
        for method in _drawn(task):
            rank = matched_rank(records, task, method)
            runs = [r for r in of(records, task, method) if r.seed == 0 and r.test is None and r.r == rank]
            runs = [run for run in runs if sign * run.validation >= sign * bound]
            points = [(run.validation, run.retention[name]) for run in sorted(runs, key=lambda run: run.lr)]
            _curve(axes, method, points)
        axes.set_ylabel(name)
        if name.startswith("perplexity"):
            axes.set_yscale("log")
            _plain(axes.yaxis)
        if TASKS[task].metric == "perplexity":
            axes.set_xscale("log")
            _plain(axes.xaxis)

    return draw


def _drawn(task: str) -> list[str]:
    return [method for method in LOOKS if method in methods_of(task)]


def _curve(axes: Axes, method: str, points: Sequence[Point], *, large: bool = True) -> None:
    if points:
        color, marker = LOOKS[method]
        across, up = zip(*points, strict=True)
        size, width = (4.5, 1.4) if large else (2.5, 0.7)
        axes.plot(across, up, color=color, marker=marker, markersize=size, linewidth=width, label=ALL[method].label)


def draw_panels(
    panels: Sequence[Panel], file: Path, across: str, columns: int = 3, size: tuple[float, float] = (WIDE, HIGH)
) -> Path:
    """Panels in rows, with one legend below them."""
    wide, high = size
    rows = -(-len(panels) // columns)
    width, height = columns * (wide + GAP), rows * (high + ABOVE) + BELOW
    with style():
        figure = new_figure(width, height)
        labels = {}
        for place, (title, draw) in enumerate(panels):
            row, column = divmod(place, columns)
            left, bottom = column * (wide + GAP), height - (row + 1) * (high + ABOVE) + 0.25
            axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
            draw(axes)
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK)
            axes.set_xlabel(across, color=QUIET)
            axes.grid(color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            labels |= {line.get_label(): line for line in axes.get_lines()}
        wanted = -(-len(labels) // 2) if any(len(label) > 20 for label in labels) else len(labels)
        figure.legend(labels.values(), labels.keys(), loc="lower left", ncols=wanted, frameon=False)
        return write(figure, file)
