"""build/zoo/zoo.md: the totals, the refusals with their reasons, then a table for each library."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from zoo.result import CHECKS, HIDDEN, LEAVES, NOT_APPLICABLE, OK, REFUSED, YES, Result

_NONE = "\u2013"
_LIBRARIES = ("torchvision", "timm", "transformers", "diffusers")


def totals(results: list[Result]) -> dict[str, str]:
    """The summary."""
    matched = sum(result.matched for result in results)
    ratios = sorted(ratio for result in results if (ratio := result.ratio) is not None)
    counts = {
        "models": f"{len(results)}",
        "layers adapted": f"{matched}",
        "models traced by torch.fx": f"{sum(result.traced == YES for result in results)}",
        "models captured by torch.export": f"{sum(result.traced in (LEAVES, HIDDEN) for result in results)}",
        "of these, with layers that only one mode calls": f"{sum(result.traced == HIDDEN for result in results)}",
        "layers refused": f"{sum(len(result.refused) for result in results)}",
        "models with a wrong result": f"{sum(bool(result.failures) for result in results)}",
        "layers without a gradient": f"{sum(len(result.inert) for result in results)}",
    }
    counts["CPU minutes"] = f"{sum(result.cpu_s for result in results) / 60:.0f}"
    counts["slowest first transform"] = f"{max(result.first_s for result in results):.1f}s" if results else ""
    if ratios:
        counts["transform time / symbolic_trace time: median, largest"] = (
            f"{ratios[len(ratios) // 2]:.1f}, {ratios[-1]:.1f}"
        )
    return counts


def markdown(results: list[Result], measured: str) -> str:
    """The whole page; `measured` says with which code, releases and processor."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.partition("/")[0]].append(result)
    order = sorted(groups, key=lambda library: (*_LIBRARIES, library).index(library))
    return "\n".join(
        [
            "# The zoo",
            "",
            "<!-- `make zoo` writes this page; do not edit it. -->",
            "",
            "Every linear layer and convolution of every model is adapted (r = 3, random vectors), and the model is",
            "compared with the plain model over weights `W Q` in float64.",
            "",
            measured,
            "",
            "| | total |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in totals(results).items()),
            "",
            *_by_library(groups, order),
            *_troubles(results),
            *_refusals(results),
            *_not_traced(results),
            *_notes(results),
            *_legend(),
            *(line for library in order for line in _section(library, groups[library])),
        ]
    )


def _by_library(groups: dict[str, list[Result]], order: list[str]) -> Iterable[str]:
    yield "| library | models | correct | traced | captured | layers | refused layers |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for library in order:
        rows = groups[library]
        numbers = (
            len(rows),
            sum(row.right for row in rows),
            sum(row.traced == YES for row in rows),
            sum(row.traced in (LEAVES, HIDDEN) for row in rows),
            sum(row.matched for row in rows),
            sum(len(row.refused) for row in rows),
        )
        yield f"| {library} | {' | '.join(map(str, numbers))} |"
    yield ""


def _troubles(results: list[Result]) -> Iterable[str]:
    wrong = [result for result in results if not result.right]
    if not wrong:
        return
    yield from ("## Wrong results", "")
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
    yield from ("## Refused layers", "", "| reason | layers |", "|---|---|")
    yield from _by_reason(found)


def _not_traced(results: list[Result]) -> Iterable[str]:
    """Reason -> models that `trace=True` refuses."""
    found: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if result.traced.startswith(REFUSED):
            reason = result.traced.removeprefix(REFUSED).partition(" Leave out trace=True")[0]
            found[reason.partition(": ")[2] or reason].append(result.name)
    if found:
        yield from ("## Not traced", "", "| reason | models |", "|---|---|")
        yield from _by_reason(found)


def _by_reason(found: dict[str, list[str]]) -> Iterable[str]:
    for reason, places in sorted(found.items()):
        counted = Counter(places)
        shown = ", ".join(f"`{place}`" + (f" × {n}" if n > 1 else "") for place, n in list(counted.items())[:12])
        more = f" and {len(counted) - 12} more" if len(counted) > 12 else ""
        yield f"| {_cell(reason)} | {shown}{more} |"
    yield ""


def _notes(results: list[Result]) -> Iterable[str]:
    """Layers that are not called, or of width one (a reflection changes a sign only); checks not made."""
    lines = [
        f"- `{r.name}`: no output depends on the vectors of {', '.join(_shown(r.untouched))}"
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
        "## Columns",
        "",
        "- layers: adapted layers. refused: layers that `transform` refuses, see above.",
        "- graph: how `transform(..., trace=True)` makes a graph: by torch.fx, of layers (torch.export captures a call",
        "  with the layers as leaves; some by mode: a part of it runs other layers in each mode), or not at all.",
        f"- ✓ correct, {_NONE} not applicable (a fixed input size, say), ⊘ refused with a reason, ✗ wrong.",
        "- start: fresh adapters change nothing. random: random adapters give the output of weights `W Q`. train: the",
        "  same in train mode, with dropout and batch norm. grads: gradients of every adapter, in both modes. batch,",
        "  size: another batch size and input size. copy: a deep copy. state: a `state_dict` loaded into a new model.",
        "  trace: the graph gives the same outputs and buffers in both modes, for another batch too, and the same",
        "  gradients. fold: `fold` gives the same outputs.",
        "- time: of the first `transform` (and as a multiple of the time of `symbolic_trace`, where that works).",
        "",
    )


def _section(library: str, results: list[Result]) -> Iterable[str]:
    checks = [name for name in CHECKS if name != "transform"]
    yield from (f"## {library}", "")
    header = ["model", "layers", "refused", "graph", *(CHECKS[name] for name in checks), "time"]
    yield "| " + " | ".join(header) + " |"
    yield "|---" + "|--:" * 2 + "|---" + "|:-:" * len(checks) + "|--:|"
    for row in results:
        numbers = (row.matched, len(row.refused))
        traced = "no" if row.traced.startswith(REFUSED) else row.traced
        glyphs = [_glyph(row.checks.get(name, "")) for name in checks]
        if "transform" in row.failures:
            glyphs[0] = "✗ transform"
        ratio = f" ({row.ratio:.1f}×)" if row.ratio else ""
        cells = [f"`{row.name.partition('/')[2]}`", *(str(n) if n else "" for n in numbers), traced, *glyphs]
        yield "| " + " | ".join([*cells, f"{row.first_s:.2f}s{ratio}"]) + " |"
    yield ""


def _glyph(text: str) -> str:
    if not text or text == NOT_APPLICABLE:
        return _NONE
    return "✓" if text == OK else "⊘" if text.startswith(REFUSED) else "✗"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
