"""The table of a run in Markdown: a row for each setting, with ratios of two methods in the same rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speed.formatting import megabytes, seconds, share
from speed.grid import LLAMA
from speed.methods import ALL, METHODS
from speed.models import WORKLOADS
from speed.ratios import Ratio, median
from speed.results import Cell
from speed.setting import Mode, Setting

MODES: dict[Mode, str] = {
    "training": "training step",
    "inference": "inference",
    "generate": "`generate`, 8 tokens after a prompt",
    "memory": "peak memory of a training step",
}
#: The columns: a method, over another one. A copy of the base model shows the noise.
PAIRS = (
    ("ours", "lora"),
    ("ours", "peft-hra"),
    ("ours", "base"),
    ("ours-gs", "ours"),
    ("folded", "base"),
    ("base-again", "base"),
)


def table(cells: Sequence[Cell]) -> Iterator[str]:
    """The lines of the table, and which methods were left out. Intervals are in parentheses."""
    pairs = [pair for pair in PAIRS if any(_ratio(cell, *pair) for cell in cells)]
    heads = [f"{METHODS[own].title} / {METHODS[peer].title}" for own, peer in pairs]
    yield _row(["", "hra_fx", *heads])
    yield f"|---|{'--:|' * (1 + len(pairs))}"
    for cell in cells:
        yield _row([described(cell.setting), _absolute(cell), *(_share(_ratio(cell, *pair)) for pair in pairs)])
    yield ""
    for cell in cells:
        for key, why in cell.measured.left_out.items():
            yield f"Not measured: {ALL[key].title}, {described(cell.setting)}: {why}\n"


def described(setting: Setting) -> str:
    """What is done; the model if it is not the main one, and what differs from float32 and r=8.

    >>> described(Setting("llama-768x3", "training", 512, "bfloat16", compiled=True))
    'training step, 512 tokens, bfloat16, compiled'
    >>> described(Setting("resnet50", "inference", 1, r=32))
    'ResNet-50, its 3x3 convolutions, images of 224: inference, 1 image, r=32'
    """
    workload = WORKLOADS[setting.workload]
    size = f"{setting.size} {workload.unit}" if setting.size else ""
    size = size.removesuffix("s") if setting.size == 1 else size
    model = "" if setting.workload == LLAMA else f"{workload.title}: "
    dtype = "" if setting.dtype == "float32" else setting.dtype
    rank = "" if setting.r == 8 else f"r={setting.r}"
    return f"{model}{', '.join(filter(None, [MODES[setting.mode], size, dtype, rank, 'compiled' * setting.compiled]))}"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _key(cell: Cell, method: str) -> str:
    return f"{method}-inductor" if cell.setting.compiled else method


def _ratio(cell: Cell, own: str, peer: str) -> Ratio | None:
    return cell.ratio(_key(cell, own), _key(cell, peer))


def _absolute(cell: Cell) -> str:
    value = median(cell.measured.values.get(_key(cell, "ours"), []))
    return "-" if value is None else (megabytes if cell.setting.mode == "memory" else seconds)(value)


def _share(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    interval = f" ({share(ratio.low)} to {share(ratio.high)})" if ratio.rounds > 1 else ""
    return f"{share(ratio.median)}{interval}"
