"""docs/zoo.md: the totals, the refusals with their reasons, then a table for each library."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from zoo.result import CHECKS, NOT_APPLICABLE, OK, REFUSED, Result

_NONE = "\u2013"
_LIBRARIES = ("torchvision", "timm", "transformers", "diffusers")


def totals(results: list[Result]) -> dict[str, str]:
    """What the zoo comes to, in words and numbers."""
    matched = sum(result.matched for result in results)
    ratios = sorted(ratio for result in results if (ratio := result.ratio) is not None)
    counts = {
        "models": f"{len(results)}",
        "layers adapted": f"{matched}",
        "of them in the graph of the whole model": f"{sum(result.whole for result in results)}",
        "in the graph of a part": f"{sum(result.shared for result in results)}",
        "by themselves": f"{sum(result.alone for result in results)}",
        "models captured whole": f"{sum(result.whole > 0 and result.whole == result.matched for result in results)}",
        "layers refused": f"{sum(len(result.refused) for result in results)}",
        "silently wrong": f"{sum(bool(result.failures) for result in results)}",
        "inert layers": f"{sum(len(result.inert) for result in results)}",
    }
    counts["minutes of one core, all models together"] = f"{sum(result.cpu_s for result in results) / 60:.0f}"
    counts["slowest first transform"] = f"{max(result.first_s for result in results):.1f}s" if results else ""
    if ratios:
        counts["transform / symbolic_trace, median and largest"] = f"{ratios[len(ratios) // 2]:.1f}, {ratios[-1]:.1f}"
    return counts


def markdown(results: list[Result], seconds: float) -> str:
    """The whole page."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.partition("/")[0]].append(result)
    order = sorted(groups, key=lambda library: (*_LIBRARIES, library).index(library))
    return "\n".join(
        [
            "# The zoo",
            "",
            "Written by `make zoo`; not to be edited. Every Linear and convolution of every model is adapted (r = 3,",
            "random weights), and held against the plain model over weights `W Q` in float64.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in totals(results).items()),
            f"| minutes | {seconds / 60:.0f} |",
            "",
            *_by_library(groups, order),
            *_troubles(results),
            *_refusals(results),
            *_notes(results),
            *_legend(),
            *(line for library in order for line in _section(library, groups[library])),
        ]
    )


def _by_library(groups: dict[str, list[Result]], order: list[str]) -> Iterable[str]:
    yield "| library | models | right | captured whole | layers | whole | region | alone | refused |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for library in order:
        rows = groups[library]
        numbers = (
            len(rows),
            sum(row.right for row in rows),
            sum(row.whole > 0 and row.whole == row.matched for row in rows),
            sum(row.matched for row in rows),
            sum(row.whole for row in rows),
            sum(row.shared for row in rows),
            sum(row.alone for row in rows),
            sum(len(row.refused) for row in rows),
        )
        yield f"| {library} | {' | '.join(map(str, numbers))} |"
    yield ""


def _troubles(results: list[Result]) -> Iterable[str]:
    wrong = [result for result in results if not result.right]
    if not wrong:
        return
    yield from ("## Wrong", "")
    for result in wrong:
        troubles = [f"{name}: {_cell(text)}" for name, text in result.failures.items()] or ["nothing was checked"]
        yield f"- `{result.name}`: {'; '.join(troubles)}"
    yield ""


def _refusals(results: list[Result]) -> Iterable[str]:
    """Reason -> layers, with numbers in paths left out."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        for path, reason in result.refused.items():
            found[reason].append(f"{result.name} {re.sub(r'[.][0-9]+(?=[.]|$)', '.*', path)}")
        for name, text in result.checks.items():
            if text.startswith(REFUSED):
                found[f"({name}) {text.removeprefix(REFUSED)}"].append(result.name)
    if not found:
        return
    yield from ("## Refused", "", "| reason | layers |", "|---|---|")
    for reason, places in sorted(found.items()):
        counted = Counter(places)
        shown = ", ".join(f"`{place}`" + (f" × {n}" if n > 1 else "") for place, n in list(counted.items())[:12])
        more = f" and {len(counted) - 12} more" if len(counted) > 12 else ""
        yield f"| {_cell(reason)} | {shown}{more} |"
    yield ""


def _notes(results: list[Result]) -> Iterable[str]:
    """Layers that are not called, or of one dimension (a reflection is a sign there); checks that did not apply."""
    lines = [
        f"- `{r.name}`: no output changes with the vectors of {', '.join(_shown(r.untouched))}"
        for r in results
        if r.untouched
    ]
    lines += [f"- `{result.name}`: {_cell(note)}" for result in results for note in result.notes]
    if lines:
        yield from ("<details><summary>Notes</summary>", "", *lines, "", "</details>", "")


def _shown(paths: list[str]) -> list[str]:
    counted = Counter(re.sub(r"[.][0-9]+(?=[.]|$)", ".*", path) for path in paths)
    return [f"`{path}`" + (f" × {n}" if n > 1 else "") for path, n in counted.items()]


def _legend() -> Iterable[str]:
    yield from (
        "Columns: layers adapted, and how many of them stand in the graph of the whole model, of a part, or alone;",
        f"✓ right, {_NONE} not applicable (a fixed size, say), ⊘ refused with a reason, ✗ wrong.",
        "start: fresh reflections change nothing; random: random reflections are the rotated weights; train: the same",
        "with dropout and moving buffers; grads: of every adapter, in both modes; batch, size: another one; then a",
        "deep copy, a `state_dict` loaded into a fresh model, and `fold`. graphs: TorchDynamo's, of one call.",
        "time: the first `transform`, and how many times `symbolic_trace` a second one takes, where that works.",
        "",
    )


def _section(library: str, results: list[Result]) -> Iterable[str]:
    checks = [name for name in CHECKS if name != "transform"]
    yield from (f"## {library}", "")
    header = ["model", "layers", "whole", "region", "alone", "refused", *(CHECKS[name] for name in checks)]
    yield "| " + " | ".join([*header, "graphs", "time"]) + " |"
    yield "|---" + "|--:" * 5 + "|:-:" * len(checks) + "|---|--:|"
    for row in results:
        numbers = (row.matched, row.whole, row.shared, row.alone, len(row.refused))
        glyphs = [_glyph(row.checks.get(name, "")) for name in checks]
        if "transform" in row.failures:
            glyphs[0] = "✗ transform"
        ratio = f" ({row.ratio:.1f}×)" if row.ratio else ""
        cells = [f"`{row.name.partition('/')[2]}`", *(str(n) if n else "" for n in numbers), *glyphs]
        yield "| " + " | ".join([*cells, _cell(row.graphs)[:60], f"{row.first_s:.2f}s{ratio}"]) + " |"
    yield ""


def _glyph(text: str) -> str:
    if not text or text == NOT_APPLICABLE:
        return _NONE
    return "✓" if text == OK else "⊘" if text.startswith(REFUSED) else "✗"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
