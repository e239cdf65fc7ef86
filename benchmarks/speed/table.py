"""The tables of a run in Markdown: one for each model and what it does, a row for each setting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from speed.formatting import megabytes, seconds, share
from speed.methods import ALL
from speed.models import WORKLOADS
from speed.ratios import median
from speed.results import Cell
from speed.setting import Mode

MODES: dict[Mode, str] = {
    "training": "training step",
    "inference": "inference",
    "generate": "`generate`, 8 tokens after a prompt",
    "transform": "insert the adapter",
    "fold": "merge it into the weights",
    "memory": "peak memory of a training step",
    "gradients": "forward and backward",
    "graphed": "CUDA graph of forward and backward",
}
ABSOLUTE: dict[Mode, Callable[[float], str]] = {
    "transform": seconds,
    "fold": seconds,
    "memory": megabytes,
}
#: Compared in columns of their own, where both are there.
PAIRS = (
    ("ours", "lora"),
    ("ours", "peft-hra"),
    ("ours-gs", "ours"),
    ("ours-inductor", "lora-inductor"),
    ("ours-passes", "lora-inductor"),
)
_NONE = "-"


def tables(cells: Sequence[Cell], *, warm_compiler: bool = False) -> Iterator[str]:
    """All of them, in the order in which they were measured; `warm_compiler` if it found what it had made before."""
    groups: dict[tuple[str, Mode, bool], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.setting.workload, cell.setting.mode, cell.setting.compiled].append(cell)
    for (workload, mode, compiled), group in groups.items():
        yield f"### {WORKLOADS[workload].title}: {MODES[mode]}{', compiled' * compiled}"
        yield ""
        yield from rows(group, absolute=ABSOLUTE.get(mode))
        yield ""
        if compiled:
            yield f"Seconds by the clock of the first step, which compiles{', helped by its caches' * warm_compiler}:"
            yield ""
            yield from compilations(group)
            yield ""
        yield from left_out(group)


def rows(group: Sequence[Cell], absolute: Callable[[float], str] | None) -> Iterator[str]:
    """A table of one model: times the base, or as absolute values."""
    methods = [key for key in ALL if any(key in cell.measured.values for cell in group)]
    pairs = [pair for pair in PAIRS if set(pair) <= set(methods)]
    unit = WORKLOADS[group[0].setting.workload].unit
    heads = [unit, "dtype", "r", *(ALL[key].title for key in methods)]
    heads += [f"{ALL[own].title} / {ALL[peer].title}" for own, peer in pairs]
    yield f"| {' | '.join(heads)} |"
    yield f"|--:|---|--:|{'--:|' * (len(heads) - 3)}"
    for cell in group:
        setting = cell.setting
        named = [str(setting.size or _NONE), setting.dtype, str(setting.r)]
        numbers = [_number(cell, key, methods[0], absolute) for key in methods]
        yield f"| {' | '.join([*named, *numbers, *(_share(cell, *pair) for pair in pairs)])} |"


def _number(cell: Cell, key: str, first: str, absolute: Callable[[float], str] | None) -> str:
    """The first method's is a time, those of the others how many times that."""
    if absolute is None and key != first:
        return _share(cell, key, first)
    value = median(cell.measured.values.get(key, []))
    return _NONE if value is None else (absolute or seconds)(value)


def _share(cell: Cell, own: str, peer: str) -> str:
    found = cell.ratio(own, peer)
    return _NONE if found is None else share(found.median)


def compilations(group: Sequence[Cell]) -> Iterator[str]:
    """How long the compiler took."""
    methods = [key for key in ALL if any(key in cell.measured.first for cell in group)]
    yield f"| {WORKLOADS[group[0].setting.workload].unit} | {' | '.join(ALL[key].title for key in methods)} |"
    yield f"|--:|{'--:|' * len(methods)}"
    for cell in group:
        taken = cell.measured.first
        numbers = [f"{taken[key]:.1f}" if key in taken else _NONE for key in methods]
        yield f"| {cell.setting.size} | {' | '.join(numbers)} |"


def left_out(group: Sequence[Cell]) -> Iterator[str]:
    """Who was not measured, and why."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in group:
        for key, why in cell.measured.left_out.items():
            reasons[ALL[key].title, why].append(f"{cell.setting.size}, {cell.setting.dtype}, r={cell.setting.r}")
    for (title, why), places in reasons.items():
        where = "" if len(places) == len(group) else f" ({'; '.join(places)})"
        yield f"Left out: {title}{where}, {why}"
        yield ""
