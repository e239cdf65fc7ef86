"""Six tasks one after the other on one MiniLM: what it still knows of all of them at the end.

    PYTHONPATH=benchmarks:examples python -m learning.sequence             # the runs that the file of results lacks
    PYTHONPATH=benchmarks:examples python -m learning.sequence --table     # its table

Each task is to classify posts of three related newsgroups, with a head of its own. After a task, its head is frozen,
the adapter is folded into the weights (LoRA: merged), and its posts are gone. "Protected" methods keep the main
directions of the inputs of all earlier tasks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

import hra_fx
from learning.bfloat16 import BaseProducts, is_fast
from learning.directions import lora_layers, main_inputs, protect_lora, top
from learning.keeping import DIRECTIONS
from learning.methods import METHODS, layer_shapes
from learning.records import FILE as RECORDS
from learning.summary import difference
from learning.tables import interval, spread, table
from learning.tasks.newsgroups import Newsgroups, pick, score, texts_of
from learning.tasks.task import Task
from learning.training import commit, fit

FILE = RECORDS.with_name("results_sequence.jsonl")
#: Related groups, as numbers of the sorted names. A seed draws the order of the tasks.
GROUPS = ((1, 2, 5), (3, 4, 12), (6, 7, 8), (11, 13, 14), (16, 17, 18), (0, 15, 19))
TASKS, SEEDS = len(GROUPS), range(3)
#: Posts of a task for its directions.
SAMPLES = 128
#: Method -> the one that trains, and its learning rates: that of newsgroups-1600, and a third of it.
SEQUENCES: dict[str, tuple[str, tuple[float, ...]]] = {
    "head": ("head", (1e-2, 3e-3)),
    "lora": ("lora", (3e-3, 1e-3)),
    "lora-protect": ("lora", (3e-3, 1e-3)),
    "hra-pairs": ("hra-pairs", (1e-2, 3e-3)),
    "hra-pairs-protect": ("hra-pairs", (1e-2, 3e-3)),
    "full": ("full", (3e-4, 1e-4)),
}


class Groups(Newsgroups):
    """One task of a sequence."""

    texts: ClassVar[int] = 320
    epochs: ClassVar[int] = 3

    def __init__(self, seed: int, place: int, *, tiny: bool = False) -> None:
        """Tokenize the texts of the task at a place of the sequence of a seed, and those held out."""
        Task.__init__(self, seed, tiny=tiny)
        groups = torch.tensor(random.Random(seed).sample(GROUPS, TASKS)[place])
        train, held, test = (16, 4, 8) if tiny else (self.texts, 100, 300)
        texts, labels = texts_of("train")
        order = [
            index for index in random.Random(seed).sample(range(len(texts)), len(texts)) if labels[index] in groups
        ]
        self.held_out = pick(texts, labels, order[:held], groups)
        self.examples = pick(texts, labels, order[held : held + train], groups)
        texts, labels = texts_of("test")
        self.unseen = pick(texts, labels, [one for one in range(len(texts)) if labels[one] in groups][:test], groups)

    def inputs(self) -> list[dict[str, Tensor]]:
        """Batches of its training texts, for the directions."""
        count = min(SAMPLES, self.size)
        return [self.examples.batch(list(range(start, start + 16))) for start in range(0, count, 16)]


@dataclass(frozen=True)
class Result:
    """What one sequence gave.

    Args:
        method, seed, lr, directions: the run; `directions` are those of each task and layer.
        validation: the mean accuracy on held-out training posts of all tasks at the end, in percent.
        learned: the accuracy on test posts of each task when it was just learned.
        final: the same at the end.
        seconds: CPU time on one thread.
        commit: that of the code.
    """

    method: str
    seed: int
    lr: float
    directions: int
    validation: float
    learned: list[float]
    final: list[float]
    seconds: float
    commit: str

    @property
    def scores(self) -> tuple[float, float]:
        """Mean accuracies: right after each task, and at the end."""
        return statistics.mean(self.learned), statistics.mean(self.final)


def run(name: str, seed: int, lr: float, directions: int = DIRECTIONS, *, tiny: bool = False) -> Result:
    """Learn all tasks, one after the other."""
    start = time.process_time()
    method, is_protected = METHODS[SEQUENCES[name][0]], name.endswith("-protect")
    tasks = [Groups(seed, place, tiny=tiny) for place in range(2 if tiny else TASKS)]
    model: Any = tasks[0].model()
    rank = method.rank(layer_shapes(model, Groups.targets), Groups.lora_rank)
    heads: list[nn.Module] = []
    learned: list[float] = []
    kept: dict[str, Tensor] | None = None
    for place, task in enumerate(tasks):
        torch.manual_seed(TASKS * seed + place)  # the same head for each method
        model.head = nn.Linear(model.encoder.config.hidden_size, len(GROUPS[0]))

        def prepare(optimizer: torch.optim.Optimizer, model: nn.Module, task: Task, place: int = place) -> None:
            nonlocal kept
            method.prepare_optimizer(optimizer, model, task)
            if is_protected and place:
                kept = protect(optimizer, model, tasks[place - 1].inputs(), directions, kept)

        with products(model):
            method.insert(model, task, rank)
            model.head.requires_grad_(True)
            fit(model, model.head, task, replace(method, prepare_optimizer=prepare), lr)
        model = folded(model)
        heads.append(model.head.requires_grad_(False))
        learned += scores_of(model, heads[-1:], [task])
    final, validation = scores_of(model, heads, tasks), scores_of(model, heads, tasks, held_out=True)
    seconds = round(time.process_time() - start, 1)
    used = directions if is_protected else 0
    return Result(name, seed, lr, used, round(statistics.mean(validation), 2), learned, final, seconds, commit())


def products(model: nn.Module) -> Any:
    """Products with the weights in bfloat16, where that is fast."""
    return BaseProducts(model) if is_fast() else nullcontext()


def protect(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    directions: int,
    previous: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """`hra_fx.protect`, and the same for LoRA."""
    layers = lora_layers(model)
    if not layers:
        return hra_fx.protect(optimizer, model, batches, directions, previous)
    kept = {}
    for path, moments in main_inputs(model, layers, batches, lambda moments: moments).items():
        earlier = previous[path] if previous else moments[:, :0]
        rest = torch.eye(len(moments)) - earlier @ earlier.T
        kept[path] = torch.cat([earlier, top(directions)(rest @ moments @ rest)], dim=1)
    protect_lora(optimizer, model, kept)
    return kept


def folded(model: nn.Module) -> nn.Module:
    """The model without adapters."""
    for path, layer in lora_layers(model).items():
        layer.merge()
        model.set_submodule(path, layer.base_layer)
    vars(model).pop("peft_config", None)  # PEFT warns of it in the next task
    return hra_fx.fold(model) if any("hra_u" in part._modules for part in model.modules()) else model


@torch.no_grad()
def scores_of(
    model: Any, heads: Sequence[nn.Module], tasks: Sequence[Groups], *, held_out: bool = False
) -> list[float]:
    """The accuracy of each task with its head, on test posts or held-out training posts."""
    found = []
    with products(model):
        for head, task in zip(heads, tasks, strict=True):
            model.head = head
            found.append(round(score(model, task.held_out if held_out else task.unseen), 2))
    return found


def read() -> list[Result]:
    """All results."""
    return [Result(**json.loads(line)) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def chosen(results: Sequence[Result], name: str, directions: int) -> list[Result]:
    """The runs of a method at the learning rate that is best on the held-out training posts of the first seed."""
    runs = [one for one in results if one.method == name and one.directions in (0, directions)]
    first = [one for one in runs if one.seed == SEEDS[0]]
    best = max(first, key=lambda one: one.validation, default=None)
    return [one for one in runs if best is not None and one.lr == best.lr]


def missing(
    results: Sequence[Result], seeds: Sequence[int], methods: Sequence[str], directions: int
) -> tuple[str, int, float] | None:
    """The next run: all rates of all methods with the first seed, and then the best ones with the other seeds."""
    done = {(one.method, one.seed, one.lr) for one in results if one.directions in (0, directions)}
    for place in range(2):
        for name in methods:
            if SEEDS[0] in seeds and (name, SEEDS[0], SEQUENCES[name][1][place]) not in done:
                return name, SEEDS[0], SEQUENCES[name][1][place]
    for seed in seeds:
        for name in methods:
            for best in chosen(results, name, directions)[:1]:
                if (name, seed, best.lr) not in done:
                    return name, seed, best.lr
    return None


SECTION = """\
## Six tasks, one after the other

MiniLM learns six tasks of three related newsgroups each, with {texts} posts, {epochs} epochs, and a head of its own for
each task. After a task, its head is frozen, the adapter is folded into the weights (LoRA: merged), and its posts are
gone. "Protected" methods keep the {directions} main directions of the inputs of each earlier task
(`hra_fx.protect(..., previous=)`; for LoRA, the benchmark does the same). Mean accuracies on test posts of all six
tasks; each method has the better of two learning rates, on held-out posts of the first seed. The last column has the
paired difference to LoRA with its 95% interval. `python -m learning.sequence` makes these runs.

{table}"""


def section(results: Sequence[Result]) -> str:
    """The part of docs/results.md; empty while runs are missing."""
    if missing(results, SEEDS, list(SEQUENCES), DIRECTIONS):
        return ""
    sizes = {"texts": Groups.texts, "epochs": Groups.epochs, "directions": DIRECTIONS}
    return SECTION.format(**sizes, table=make_table(results))


def make_table(results: Sequence[Result], directions: int = DIRECTIONS) -> str:
    """Means over seeds, and paired differences to LoRA with 95% intervals."""
    base = {one.seed: one.scores[1] for one in chosen(results, "lora", directions)}
    rows = []
    for name, (trained, _) in SEQUENCES.items():
        runs = chosen(results, name, directions)
        if runs:
            after, end = zip(*(one.scores for one in runs), strict=True)
            lost = [one - other for one, other in zip(after, end, strict=True)]
            gain = "-" if name == "lora" else interval(difference({run.seed: run.scores[1] for run in runs}, base))
            label = METHODS[trained].label + (", protected" if name != trained else "")
            rows.append([label, f"{runs[0].lr:g}", str(len(runs)), spread(after), spread(end), spread(lost), gain])
    return table(["method", "rate", "seeds", "just learned, %", "at the end, %", "lost", "end, against LoRA"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", choices=SEQUENCES, nargs="+", default=list(SEQUENCES))
    parser.add_argument("--directions", type=int, default=DIRECTIONS, help="of each task and layer")
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    while not options.table and (one := missing(read(), options.seeds, options.methods, options.directions)):
        made = run(*one, options.directions)
        with FILE.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        print(*one, made.validation, *made.scores, made.seconds, flush=True)
    print(make_table(read(), options.directions))


if __name__ == "__main__":
    main()
