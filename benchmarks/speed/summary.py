"""The summary at the top of the page: hra_fx compared with PEFT's LoRA and HRA and with the frozen base model."""

from __future__ import annotations

from collections.abc import Iterator

from speed.formatting import megabytes, seconds, share
from speed.grid import LLAMA, STEPS
from speed.labels import described
from speed.methods import ALL
from speed.ratios import median
from speed.results import Cell, Results
from speed.setting import Setting

PEERS = ("lora", "peft-hra", "base")


def _shown() -> Iterator[tuple[Setting, str]]:
    """Each setting, and the method of hra_fx."""
    for tokens in (16, 512, 2048):
        yield Setting(LLAMA, "training", tokens), "ours"
    yield Setting(LLAMA, "training", 512, "bfloat16"), "ours"
    yield Setting(LLAMA, "training", 512, compiled=True), "ours-inductor"
    yield Setting(LLAMA, "memory", 512), "ours"
    for tokens in (1, 16, 512, 2048):
        yield Setting(LLAMA, "inference", tokens), "ours"
    yield Setting(LLAMA, "inference", 512, "bfloat16"), "ours"
    yield Setting(LLAMA, "generate", 16), "ours"
    yield Setting(LLAMA, "inference", 512), "folded"
    for mode in STEPS:
        yield Setting("resnet50-224", mode, 2), "ours"


def summary(results: Results) -> Iterator[str]:
    """A Markdown table of the settings that were measured; nothing if none was."""
    rows = [_row(cell, own) for setting, own in _shown() if (cell := results.cell(setting)) and _has(cell, own)]
    if rows:
        yield f"| | hra_fx | {' | '.join(f'hra_fx / {ALL[peer].title}' for peer in PEERS)} |"
        yield f"|---|--:|{'--:|' * len(PEERS)}"
        yield from rows


def _has(cell: Cell, own: str) -> bool:
    return own in cell.measured.values


def _row(cell: Cell, own: str) -> str:
    setting = cell.setting
    value = median(cell.measured.values[own]) or 0.0
    absolute = megabytes if setting.mode == "memory" else seconds
    compiled = "-inductor" * setting.compiled
    found = [cell.ratio(own, f"{peer}{compiled}") for peer in PEERS]
    ratios = [share(ratio.median) if ratio else "-" for ratio in found]
    return f"| {described(setting)}{', folded' * (own == 'folded')} | {' | '.join([absolute(value), *ratios])} |"
