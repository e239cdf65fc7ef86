"""What each method keeps of what SmolLM2 knows: the tables of docs/results.md, and the picture of README."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from learning.keeping import ALL
from learning.rates import chosen
from learning.records import Record, of
from learning.summary import difference, value
from learning.table import interval, label, number, spread, table

TASK = "language"
TALES, TWEETS, FACTS = "perplexity of tales", "perplexity of tweets", "facts, %"


#: The rates that validation chose.
LORA, PAIRS = 5.5e-3, 1e-2


@dataclass(frozen=True)
class Row:
    """A method of the table.

    Args:
        method: its name, with `@scale` for a trained model that keeps a part of its change.
        lr: its learning rate; None for the one that validation chose.
        in_picture: whether the picture has it.
    """

    method: str
    lr: float | None = None
    in_picture: bool = False

    @property
    def trained(self) -> str:
        """The method without a scale."""
        return self.method.partition("@")[0]

    def rate(self, records: Sequence[Record], task: str = TASK) -> float:
        """The learning rate; 0 if nothing is trained."""
        if self.lr or not ALL[self.trained].rates:
            return self.lr or 0.0
        plain = ALL[self.trained].rate_of or self.trained
        return {"lora": LORA, "hra-pairs": PAIRS}.get(plain) or chosen(records, task, self.method)

    def runs(self, records: Sequence[Record], task: str = TASK) -> list[Record]:
        """Its runs in order of their seeds, the last one of each, without old ones that have no `moved`."""
        mine = [run for run in of(records, task, self.method) if run.moved is not None and run.test is not None]
        by_seed = {run.seed: run for run in mine if run.lr == self.rate(records, task)}
        return [by_seed[seed] for seed in sorted(by_seed)]


ROWS = (
    Row("base", in_picture=True),
    Row("lora", in_picture=True),
    Row("lora", 3e-3),
    Row("lora@0.75", in_picture=True),
    Row("lora@0.5"),
    Row("lora-decay"),
    Row("lora-protect", in_picture=True),
    Row("lora-distance-own", in_picture=True),
    Row("corda", in_picture=True),
    Row("osf", in_picture=True),
    Row("hra-pairs", in_picture=True),
    Row("hra-pairs@0.75", in_picture=True),
    Row("hra-pairs@0.5"),
    Row("hra-pairs-protect", in_picture=True),
    Row("hra-pairs-protect-own", in_picture=True),
    Row("hra-pairs-protect-random"),
    Row("hra-pairs-protect-directions"),
    Row("hra-pairs-distance", in_picture=True),
    Row("hra-pairs-distance-own", in_picture=True),
    Row("hra-pairs-distance-own-one"),
    Row("hra-pairs-distance-own-second"),
    Row("hra-pairs-distance-own-0.3"),
    Row("hra-pairs-distance-own-3"),
    Row("hra-pairs-both-own"),
    Row("full", 1e-4, in_picture=True),
    Row("full", 1.7e-4, in_picture=True),
    Row("full@0.75", 1.7e-4, in_picture=True),
)
PLAIN = Row("hra-pairs")
#: The rows of the guide, docs/keep.md.
GUIDE = (
    *("base", "lora", "hra-pairs", "hra-pairs-distance-own", "hra-pairs-distance-own-second"),
    *("hra-pairs-protect-own", "hra-pairs@0.75"),
)
#: Tasks that differ from `language` in one respect, and the methods that ran on them.
LAYERS = {f"{TASK}-mlp": "MLP", f"{TASK}-attention": "attention"}
OTHERS = {f"{TASK}-slovene": "Slovene comments", f"{TASK}-256-steps": "256 steps"}
IN_LAYERS, IN_OTHERS = ("lora", "hra-pairs"), ("lora", "hra-pairs", "hra-pairs-distance-own-second")
HEADS = ["rate", "seeds", "new posts ↓", "over pairs", "tales ↓", "tweets ↓", "facts, % ↑", "moved", "time"]


def wanted() -> Iterator[tuple[str, str, float | None]]:
    """Task, method and rate of all runs of the tables."""
    yield from ((TASK, row.method, row.lr) for row in ROWS if "@" not in row.method)
    for tasks, methods in ((LAYERS, IN_LAYERS), (OTHERS, IN_OTHERS)):
        yield from ((task, method, LORA if method == "lora" else PAIRS) for task in tasks for method in methods)


def kept_table(records: Sequence[Record]) -> str:
    """A row for each method that ran: new posts, what is kept, how far the weights moved, and the time over LoRA's."""
    found = ([label(row.method), *cells(records, row)] for row in ROWS if row.runs(records))
    return table(["", *HEADS], list(found))


def layers_table(records: Sequence[Record]) -> str:
    """Adapters in all layers, in the MLPs alone, and in the attention alone, with as many parameters."""
    places = {TASK: "all layers", **LAYERS}
    rows = [
        [f"{label(method)}, {told}", *cells(records, Row(method), task, (Row(method), TASK))]
        for method in IN_LAYERS
        for task, told in places.items()
        if Row(method).runs(records, task)
    ]
    return table(["", *(head.replace("pairs", "all layers") for head in HEADS)], rows)


def others_table(records: Sequence[Record]) -> str:
    """Other texts to learn, and more steps."""
    rows = [
        [f"{told}: {label(method)}", *cells(records, Row(method), task, (PLAIN, task))]
        for task, told in OTHERS.items()
        for method in IN_OTHERS
        if Row(method).runs(records, task)
    ]
    return table(["", *HEADS], rows)


def cells(records: Sequence[Record], row: Row, task: str = TASK, over: tuple[Row, str] = (PLAIN, TASK)) -> list[str]:
    """The cells of `HEADS`; `over` is what the new posts are compared with."""
    runs, others = row.runs(records, task), over[0].runs(records, over[1])
    more = difference({run.seed: value(run) for run in runs}, {run.seed: value(run) for run in others})
    time = step_time(records, runs)
    same = (row.method, task) == (over[0].method, over[1])
    return [
        f"{runs[0].lr:g}" if runs[0].lr else "-",
        str(len(runs)),
        spread([value(run) for run in runs]),
        "-" if same or math.isnan(more.mean) or not runs[0].lr else interval(more),
        *(spread([run.retention[name] for run in runs]) for name in (TALES, TWEETS, FACTS)),
        f"{100 * statistics.fmean(map(moved, runs)):.1f}%",
        number(time) if time else "-",
    ]


def step_time(records: Sequence[Record], runs: Sequence[Record]) -> float:
    """The mean time of a step over that of LoRA in all layers with the same seed; 0 if nothing was trained."""
    task = runs[0].task if runs[0].task in OTHERS else TASK
    lora = {run.seed: run.seconds for run in Row("lora").runs(records, task)}
    times = [run.seconds / lora[run.seed] for run in runs if run.seed in lora]
    return statistics.fmean(times) if times else 0.0


def guide_table(records: Sequence[Record]) -> str:
    """A row for each way to keep something that ran: the means of new posts, and of what is kept."""
    columns = [("new posts ↓", ""), ("tales ↓", TALES), ("tweets ↓", TWEETS), ("facts, % ↑", FACTS)]
    found = [(row, runs) for row in (*map(Row, GUIDE), Row("full@0.75", 1.7e-4)) if (runs := row.runs(records))]
    rows = [
        [label(row.method), *(f"{statistics.fmean(value(run, name) for run in runs):.0f}" for _, name in columns)]
        for row, runs in found
    ]
    return table(["", *(head for head, _ in columns)], rows)


def moved(run: Record) -> float:
    """How far the weights moved."""
    assert run.moved is not None
    return run.moved


def equal_movement_table(records: Sequence[Record]) -> str:
    """Pairs that keep something, and how they differ from plain pairs whose weights moved as far, seed by seed."""
    rows = []
    for row in ROWS:
        runs = row.runs(records) if row.trained.startswith("hra-pairs-") else []
        found = {run.seed: (run, plain) for run in runs if (plain := plain_scales(records, run.seed))}
        if found:
            own = [label(row.method), f"{100 * statistics.fmean(moved(run) for run, _ in found.values()):.1f}%"]
            for name in ("", TALES, TWEETS):
                ours = {seed: value(run, name) for seed, (run, _) in found.items()}
                theirs = {seed: at_movement(plain, moved(run), name) for seed, (run, plain) in found.items()}
                own += [number(statistics.fmean(ours.values())), interval(difference(ours, theirs))]
            rows.append(own)
    heads = [head for name in ("new posts", "tales", "tweets") for head in (name, "over plain")]
    return table(["", "moved", *heads], rows)


def plain_scales(records: Sequence[Record], seed: int) -> list[Record]:
    """The run of plain pairs with a seed, at all of its scales, in rising order."""
    rows = [replace(PLAIN, method=f"{PLAIN.method}{scale}") for scale in ("@0.5", "@0.75", "")]
    return [run for row in rows for run in row.runs(records) if run.seed == seed]


def at_movement(scales: Sequence[Record], wanted: float, name: str) -> float:
    """The perplexity of a model whose weights moved as far as wanted, from those at several scales.

    Between two scales, and beyond the last one, its logarithm is linear in how far the weights moved.
    """
    points = [(moved(run), math.log(value(run, name))) for run in scales]
    place = min(max(bisect.bisect([x for x, _ in points], wanted), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return math.exp(y0 + (y1 - y0) * (wanted - x0) / (x1 - x0))
