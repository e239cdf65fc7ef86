"""Which runs there are, and which of them the file of results lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learning.keeping import CONTROLS, KEEPING
from learning.rates import OWN_RATES, RATES_FROM, below, chosen, final_runs, missing_rates, searched
from learning.records import Record, of
from learning.variants import ALL, BASE_OF, VARIANTS

TEACHERS = ("teacher-rotation", "teacher-low-rank", "teacher-dense")
#: Tasks and methods in the order of the runs.
STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("language", ("base", "lora", "hra-pairs", "hra")),
    ("digits", ("lora", "hra-pairs", "hra")),
    *((task, ("lora", "hra-pairs", "hra", "full")) for task in TEACHERS),
    ("newsgroups-1600", ("lora", "hra-pairs", "hra", "head")),
    *((task, ("lora-2r", "dora", "oft", "hra-peft", "hra-gs")) for task in TEACHERS),
    ("digits", ("head", "full")),
    ("language-4-passes", ("lora", "hra-pairs")),
    ("language-long", ("lora", "hra-pairs")),
    ("language-4-bit", ("lora", "hra-pairs")),
    ("language-float32", ("lora", "hra-pairs")),
    ("language", ("full", "dora", "oft", *VARIANTS)),
    ("newsgroups-5000", ("lora", "hra-pairs", "hra", "full")),
    ("newsgroups-1600", ("full", "dora", "oft")),
    # PEFT's OFT fails for the convolutions, and its HRA takes many times as long.
    ("digits", ("lora-2r", "dora", "hra-gs", "hra-reg")),
    ("language", ("hra-quiet", *KEEPING, *CONTROLS)),
    *((task, ("hra-quiet",)) for task in TEACHERS),
    ("digits", ("hra-quiet", *KEEPING)),
    ("newsgroups-1600", ("hra-quiet",)),
    ("newsgroups-retrieval", ("head", "lora", "hra-pairs", "hra-quiet", *KEEPING)),
    *((task, ("boft", "psoft", "road", "miss")) for task in TEACHERS),
    # A step of PEFT's BOFT multiplies square matrices for each layer: a run would take more than 15 minutes.
    ("language", ("psoft", "road", "miss")),
)
TASK_NAMES = (
    "language",
    "language-4-passes",
    "language-long",
    "language-4-bit",
    "language-float32",
    "newsgroups-1600",
    "newsgroups-5000",
    "newsgroups-retrieval",
    "digits",
    *TEACHERS,
)
SEEDS = range(5)
#: Tasks and methods with more seeds.
TEN_SEEDS = {"language": ("lora", "hra-pairs", "hra-quiet")}
#: Tasks with one seed, because their runs take so long.
ONE_SEED = ("language-long",)
#: Variants of HRA and controls have so many seeds, and so do other methods on `language`.
TRIAL_SEEDS = range(3)
FEW_SEEDS = {"language": ("psoft", "road", "miss")}
#: Ranks of LoRA and of HRA in the plots over the number of parameters, with validation scores at two learning rates,
#: because larger ranks may need lower ones.
LORA_RANKS, HRA_RANKS = (1, 2, 4, 8, 16), (2, 4, 8, 16, 32)
RANKS = {
    "language": {"lora": LORA_RANKS[1:], "hra-pairs": HRA_RANKS[1:]},
    **{task: {"lora": LORA_RANKS, "hra-pairs": HRA_RANKS} for task in TEACHERS},
}
#: The seeds of these runs. One for the language model, whose runs take minutes.
RANK_SEEDS = {"language": range(1), **dict.fromkeys(TEACHERS, range(3))}


@dataclass(frozen=True)
class Run:
    """The arguments of `training.run`."""

    task: str
    method: str
    seed: int
    lr: float
    r: int | None
    test: bool


def methods_of(task: str) -> list[str]:
    """The methods that run on a task, in the order of its table: HRA's variants last."""
    planned = [method for stage, methods in STAGES if stage == task for method in methods]
    return [method for method in ALL if method in planned]


def missing(records: Sequence[Record], tasks: Sequence[str]) -> list[Run]:
    """The runs whose learning rates are known, which can be made next; those of other ranks come last."""
    stages = [(task, method) for task, methods in STAGES if task in tasks for method in methods]
    planned = [run for task, method in stages for run in missing_of(records, task, method)]
    return planned or [run for task, method in stages for run in missing_ranks(records, task, method)]


def missing_of(records: Sequence[Record], task: str, method: str) -> list[Run]:
    """Those of one method: the grid of learning rates, and then the seeds."""
    if method in BASE_OF:
        if missing_of(records, task, BASE_OF[method]) or not searched(records, task, BASE_OF[method]):
            return []
    elif tries := missing_rates(records, task, method):
        # A later test of the same run would cost another one: the first of a rate reads the validation split only.
        test = task in ONE_SEED or method in FEW_SEEDS.get(task, ())
        own = task in OWN_RATES or task not in RATES_FROM
        return [Run(task, method, seed, lr, None, test=test or seed > 0) for lr, seed in tries] if own else []
    elif ALL[method].rates and not searched(records, task, method):
        return []  # another task has to choose the first rate
    lr, trial = chosen(records, task, method), method in VARIANTS
    done = {run.seed for run in of(records, task, method) if run.lr == lr and (trial or run.test is not None)}
    return [Run(task, method, seed, lr, None, test=not trial) for seed in seeds_of(task, method) if seed not in done]


def seeds_of(task: str, method: str) -> range:
    """The seeds of a method's last runs."""
    if method in VARIANTS or method in CONTROLS or method in FEW_SEEDS.get(task, ()):
        return TRIAL_SEEDS
    if method in TEN_SEEDS.get(task, ()):
        return range(10)
    return SEEDS if ALL[method].rates and task not in ONE_SEED else range(1)


def untrained(task: str) -> str:
    """The method that trains at most a new head, on a task or on the task that it varies."""
    own = [method for method in methods_of(task) if method in ("base", "head")]
    return own[0] if own else untrained(RATES_FROM[task])


def finished(records: Sequence[Record], task: str, method: str) -> bool:
    """Whether all seeds of a method have run on a task."""
    runs = of(records, task, method) if method in VARIANTS else final_runs(records, task, method)
    return bool(runs) and not missing_of(records, task, method)


def missing_ranks(records: Sequence[Record], task: str, method: str) -> list[Run]:
    """Those with other ranks, at the learning rate that was chosen and at the next lower one."""
    if method not in RANKS.get(task, {}):
        return []
    have = {(run.r, run.seed, run.lr) for run in of(records, task, method)}
    lr = chosen(records, task, method)
    rates = [rate for rate in (lr, below(lr)) if rate in searched(records, task, method)]
    planned = [(r, seed, rate) for r in RANKS[task][method] for seed in RANK_SEEDS[task] for rate in rates]
    return [Run(task, method, seed, rate, r, test=False) for r, seed, rate in planned if (r, seed, rate) not in have]
