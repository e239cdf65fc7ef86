"""The tables of a run in Markdown: for each mode and rank one of the main model, and one of all others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from speed.formatting import megabytes, seconds, share
from speed.grid import LLAMA
from speed.labels import MODES, columns
from speed.methods import ALL
from speed.ratios import median
from speed.results import Cell
from speed.setting import Mode

#: The modes whose numbers are not relative to the first method.
ABSOLUTE: dict[Mode, Callable[[float], str]] = {"transform": seconds, "fold": seconds, "memory": megabytes}
#: Compared in a column of its own, by the pairs of each round.
PAIRS = (("ours", "lora"), ("ours-inductor", "lora-inductor"), ("ours-reduced", "lora-reduced"))
#: A copy of the base model shows the noise. It has a line below the table.
COPY = "base-again"
_NONE = "-"


def tables(cells: Sequence[Cell], *, warm_compiler: bool = False) -> Iterator[str]:
    """All tables, in the order in which they were measured; `warm_compiler` if the compiler's cache was not empty."""
    groups: dict[tuple[Mode, bool, int, bool], list[Cell]] = defaultdict(list)
    for cell in cells:
        setting = cell.setting
        groups[setting.mode, setting.compiled, setting.r, setting.workload == LLAMA].append(cell)
    for group in groups.values():
        yield from (f"### {heading(group)}", "", *rows(group), "", *noise(group), *left_out(group))
    compiled = [cell for cell in cells if cell.setting.compiled]
    if compiled:
        yield from (f"### First step, which compiles{', helped by its cache' * warm_compiler}", "")
        yield from (*compilations(compiled), "")


def heading(group: Sequence[Cell]) -> str:
    """What was measured, and what all rows have in common."""
    setting, varying = group[0].setting, _varying(group)
    fixed = [value for head, value in columns(setting).items() if value and head not in varying]
    step = f"{MODES[setting.mode]}{', compiled' * setting.compiled}"
    where = ["other models"] * ("model" in varying) + fixed
    return f"{step[0].upper()}{step[1:]}: {', '.join([*where, f'r={setting.r}'])}"


def rows(group: Sequence[Cell]) -> Iterator[str]:
    """A table: columns for what varies, for each method, and for the pairs."""
    methods = _methods(group, "values")
    absolute = ABSOLUTE.get(group[0].setting.mode)
    # A pair whose peer is the first method is there already, unless the columns are absolute.
    pairs = [pair for pair in PAIRS if set(pair) <= set(methods) and (absolute or pair[1] != methods[0])]
    labels = _varying(group)
    names = [ALL[key].title for key in methods]
    yield from _head(labels, [*names, *(f"{ALL[own].title} / {ALL[peer].title}" for own, peer in pairs)])
    for cell in group:
        first = next((key for key in methods if key in cell.measured.values), "")
        numbers = [_number(cell, key, first, absolute) for key in methods]
        named = [columns(cell.setting)[label] for label in labels]
        yield _row([*named, *numbers, *(_share(cell, *pair) for pair in pairs)])


def compilations(group: Sequence[Cell]) -> Iterator[str]:
    """How long the first step of each method took."""
    methods = _methods(group, "first")
    yield from _head(["step", "size"], [ALL[key].title for key in methods])
    for cell in group:
        taken = cell.measured.first
        numbers = [seconds(taken[key]) if key in taken else _NONE for key in methods]
        yield _row([MODES[cell.setting.mode], columns(cell.setting)["size"], *numbers])


def noise(group: Sequence[Cell]) -> Iterator[str]:
    """How far two copies of the base model are apart."""
    found = [ratio for cell in group if (ratio := cell.ratio(COPY, "base"))]
    if found:
        low, high = (share(pick(ratio.median for ratio in found)) for pick in (min, max))
        yield from (f"Noise: a copy of the base model takes {low if low == high else f'{low} to {high}'}.", "")


def left_out(group: Sequence[Cell]) -> Iterator[str]:
    """Which methods were not measured, and why."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in group:
        for key, why in cell.measured.left_out.items():
            named = columns(cell.setting)
            reasons[ALL[key].title, why].append(", ".join(named[label] for label in _varying(group)))
    for (title, why), places in reasons.items():
        where = "" if len(places) == len(group) else f" ({'; '.join(places)})"
        yield from (f"Not measured: {title}{where}: {why}", "")


def _methods(group: Sequence[Cell], of: str) -> list[str]:
    return [key for key in ALL if key != COPY and any(key in getattr(cell.measured, of) for cell in group)]


def _varying(group: Sequence[Cell]) -> list[str]:
    """The label columns: those that differ between rows, and the size if there is one."""
    found = [columns(cell.setting) for cell in group]
    return [head for head in found[0] if len({row[head] for row in found}) > 1 or (head == "size" and found[0][head])]


def _head(labels: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    yield _row([*labels, *names])
    yield f"|{'---|' * len(labels)}{'--:|' * len(names)}"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _number(cell: Cell, key: str, first: str, absolute: Callable[[float], str] | None) -> str:
    """A value with a unit for the first method of a row, and for the others the ratio to it."""
    if absolute is None and key != first:
        return _share(cell, key, first)
    value = median(cell.measured.values.get(key, []))
    return _NONE if value is None else (absolute or seconds)(value)


def _share(cell: Cell, own: str, peer: str) -> str:
    found = cell.ratio(own, peer)
    return _NONE if found is None else share(found.median)
