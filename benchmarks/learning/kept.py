"""What each method keeps of what SmolLM2 knows: the tables of docs/results.md, and the picture of README."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from learning.keeping import ALL
from learning.rates import chosen, of
from learning.records import Record
from learning.summary import difference
from learning.table import interval, label, number, spread, table

TASK = "language"
TALES, TWEETS, FACTS = "perplexity of tales", "perplexity of tweets", "facts, %"


@dataclass(frozen=True)
class Row:
    """A method of the table.

    Args:
        method: its name, with `@scale` for a trained model that keeps a part of its change.
        lr: its learning rate; None for the one that the records chose.
        in_picture: whether the picture has it.
    """

    method: str
    lr: float | None = None
    in_picture: bool = False

    @property
    def trained(self) -> str:
        """The method without a scale."""
        return self.method.partition("@")[0]

    def runs(self, records: Sequence[Record], task: str = TASK) -> list[Record]:
        """Its runs in order of their seeds, the last one of each, without old ones that have no `moved`."""
        mine = [run for run in of(records, task, self.method) if run.moved is not None and run.test is not None]
        if not mine:
            return []
        lr = self.lr or (chosen(records, task, self.method) if ALL[self.trained].rates else 0.0)
        by_seed = {run.seed: run for run in mine if run.lr == lr}
        return [by_seed[seed] for seed in sorted(by_seed)]


ROWS = (
    Row("base", in_picture=True),
    Row("lora", 5.5e-3, in_picture=True),
    Row("lora", 3e-3),
    Row("lora@0.75", 5.5e-3, in_picture=True),
    Row("lora@0.5", 5.5e-3),
    Row("lora-decay", 5.5e-3),
    Row("lora-protect", 5.5e-3, in_picture=True),
    Row("lora-distance-own", 5.5e-3, in_picture=True),
    Row("corda", in_picture=True),
    Row("osf", in_picture=True),
    Row("hra-pairs", 1e-2, in_picture=True),
    Row("hra-pairs@0.75", 1e-2, in_picture=True),
    Row("hra-pairs@0.5", 1e-2),
    Row("hra-pairs-protect", 1e-2, in_picture=True),
    Row("hra-pairs-protect-own", 1e-2, in_picture=True),
    Row("hra-pairs-protect-random", 1e-2),
    Row("hra-pairs-protect-directions", 1e-2),
    Row("hra-pairs-distance", 1e-2, in_picture=True),
    Row("hra-pairs-distance-own", 1e-2, in_picture=True),
    Row("hra-pairs-distance-own-one", 1e-2),
    Row("hra-pairs-distance-own-second", 1e-2),
    Row("hra-pairs-distance-own-0.3", 1e-2),
    Row("hra-pairs-distance-own-3", 1e-2),
    Row("hra-pairs-both-own", 1e-2),
    Row("full", 1e-4, in_picture=True),
    Row("full", 1.7e-4, in_picture=True),
    Row("full@0.75", 1.7e-4, in_picture=True),
)
PLAIN = Row("hra-pairs", 1e-2)
#: The rows of the guide, docs/keep.md.
GUIDE = (
    Row("base"),
    PLAIN,
    Row("hra-pairs-distance-own", 1e-2),
    Row("hra-pairs-distance-own-second", 1e-2),
    Row("hra-pairs-distance-own-one", 1e-2),
    Row("hra-pairs-protect-own", 1e-2),
    Row("hra-pairs-protect", 1e-2),
    Row("hra-pairs@0.75", 1e-2),
    Row("lora", 5.5e-3),
    Row("full@0.75", 1.7e-4),
)
#: The tables of layers: methods with their rates, and tasks.
IN_LAYERS = {"lora": 5.5e-3, "hra-pairs": 1e-2}
LAYERS = {TASK: "all", f"{TASK}-mlp": "MLP", f"{TASK}-attention": "attention"}


#: The tables have the seeds with which all of these ran.
MAIN = (
    Row("lora", 5.5e-3),
    PLAIN,
    Row("hra-pairs-protect", 1e-2),
    Row("hra-pairs-protect-own", 1e-2),
    Row("hra-pairs-distance-own", 1e-2),
    Row("full", 1.7e-4),
)


def complete(records: Sequence[Record]) -> list[Record]:
    """The records whose seeds are those of the tables, because means of other seeds do not compare; and old ones."""
    seeds = set.intersection(*({run.seed for run in row.runs(records)} for row in MAIN))
    return [run for run in records if run.moved is None or run.seed in seeds]


def wanted() -> Iterator[tuple[str, str, float | None]]:
    """Task, method and rate of all runs of the tables."""
    yield from ((TASK, row.method, row.lr) for row in ROWS if "@" not in row.method)
    yield from ((task, method, lr) for task in LAYERS for method, lr in IN_LAYERS.items() if task != TASK)


def kept_table(records: Sequence[Record]) -> str:
    """A row for each method that ran: new posts, what is kept, how far the weights moved, and the time over LoRA's."""
    plain, lora = ({run.seed: run for run in row.runs(records)} for row in (PLAIN, Row("lora", 5.5e-3)))
    rows = []
    for row in ROWS:
        if not (runs := row.runs(records)):
            continue
        over = difference({run.seed: score(run) for run in runs}, {seed: score(run) for seed, run in plain.items()})
        times = [run.seconds / lora[run.seed].seconds for run in runs if run.seed in lora]
        rows.append(
            [
                label(row.method),
                f"{runs[0].lr:g}" if runs[0].lr else "-",
                str(len(runs)),
                spread([score(run) for run in runs]),
                "-" if row.method in ("base", PLAIN.method) or math.isnan(over.mean) else interval(over),
                *(spread([run.retention[name] for run in runs]) for name in (TALES, TWEETS, FACTS)),
                f"{100 * statistics.fmean(map(moved, runs)):.1f}%",
                "-" if row.method == "base" else number(statistics.fmean(times)) if times else "-",
            ]
        )
    heads = ["rate", "seeds", "new posts ↓", "over pairs", "tales ↓", "tweets ↓", "facts, % ↑", "moved", "time"]
    return table(["", *heads], rows)


def guide_table(records: Sequence[Record]) -> str:
    """A row for each way to keep something that ran: new posts, and what is kept."""
    found = [(row, runs) for row in GUIDE if (runs := row.runs(records))]
    columns = [("new posts ↓", ""), ("tales ↓", TALES), ("tweets ↓", TWEETS), ("facts, % ↑", FACTS)]
    cells = [
        [label(row.method), str(len(runs)), *(spread([value(run, name) for run in runs]) for _, name in columns)]
        for row, runs in found
    ]
    return table(["", "seeds", *(head for head, _ in columns)], cells)


def score(run: Record) -> float:
    """The perplexity of new posts of the test split."""
    assert run.test is not None
    return run.test


def moved(run: Record) -> float:
    """How far the weights moved."""
    assert run.moved is not None
    return run.moved


def equal_movement_table(records: Sequence[Record]) -> str:
    """Pairs that keep something, and plain pairs where their weights moved as far, seed by seed."""
    rows = []
    for row in ROWS:
        runs = row.runs(records) if row.trained.startswith("hra-pairs-") else []
        found = [(run, plain) for run in runs if (plain := plain_scales(records, run.seed))]
        if found:
            cells = [label(row.method), f"{100 * statistics.fmean(moved(run) for run, _ in found):.1f}%"]
            for name in ("", TALES, TWEETS):
                cells.append(number(statistics.fmean(value(run, name) for run, _ in found)))
                cells.append(number(statistics.fmean(at_movement(plain, moved(run), name) for run, plain in found)))
            rows.append(cells)
    heads = [f"{name}{other}" for name in ("new posts", "tales", "tweets") for other in ("", ", plain")]
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


def value(run: Record, name: str) -> float:
    """The perplexity of new posts, or what is kept as `name`."""
    return run.retention[name] if name else score(run)


def layers_table(records: Sequence[Record]) -> str:
    """Adapters in all layers, in the MLPs alone, and in the attention alone, with as many parameters."""
    rows = []
    for method, rate in IN_LAYERS.items():
        everywhere = {run.seed: score(run) for run in Row(method, rate).runs(records)}
        for task, told in LAYERS.items():
            if not (runs := Row(method, rate).runs(records, task)):
                continue
            over = difference({run.seed: score(run) for run in runs}, everywhere)
            rows.append(
                [
                    f"{label(method)}, {told}",
                    f"{runs[0].trainable:,}",
                    str(len(runs)),
                    spread([score(run) for run in runs]),
                    "-" if task == TASK or math.isnan(over.mean) else interval(over),
                    *(spread([run.retention[name] for run in runs]) for name in (TALES, TWEETS, FACTS)),
                ]
            )
    heads = ["", "parameters", "seeds", "new posts ↓", "over all layers", "tales ↓", "tweets ↓", "facts, % ↑"]
    return table(heads, rows)


def parametrization_table(records: Sequence[Record]) -> str:
    """Pairs as a parametrization, and as hooks on the optimizer in hra_fx 0.4, in the seeds of both."""
    rows = []
    for method in ("hra-pairs", "hra-pairs-protect"):
        new = {run.seed: run for run in Row(method, 1e-2).runs(records)}
        tested = [run for run in of(records, TASK, method) if run.test is not None and run.lr == 1e-2]
        old = {run.seed: run for run in tested if run.moved is None and run.r == 8 and TWEETS in run.retention}
        seeds = sorted(new.keys() & old.keys())
        for name, told in (("", "new posts"), (TALES, "tales"), (TWEETS, "tweets")):
            ours, theirs = ({seed: value(runs[seed], name) for seed in seeds} for runs in (new, old))
            if seeds:
                cells = [spread(list(values.values())) for values in (theirs, ours)]
                rows.append([f"{label(method)}: {told}", str(len(seeds)), *cells, interval(difference(ours, theirs))])
    return table(["perplexity ↓", "seeds", "hooks of 0.4", "parametrization", "difference"], rows)
