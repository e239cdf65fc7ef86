"""The performance targets: each is a ratio of two methods in one setting, with an upper limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from speed.grid import LLAMA, STEPS
from speed.ratios import Ratio
from speed.results import Cell, Results
from speed.setting import Setting

#: The maximal noise that is added to a limit. With more noise the result is unsure.
MOST_NOISE = 0.05


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        setting: the setting that is measured.
        own: the method with the target.
        peer: the method that it is compared with.
        limit: the upper limit of the ratio.
        control: a copy of `peer`; its difference from `peer` is the noise, which is added to the limit.
    """

    setting: Setting
    own: str
    peer: str
    limit: float
    control: str = ""


@dataclass(frozen=True)
class Finding:
    """A target and its measurement.

    Attributes:
        target: the target.
        ratio: of the method to its peer.
        noise: the difference of the control from the peer.
    """

    target: Target
    ratio: Ratio | None
    noise: float = 0.0

    @property
    def limit(self) -> float:
        return self.target.limit + min(self.noise, MOST_NOISE)

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio.median <= self.limit

    @property
    def verdict(self) -> str:
        """The result by the medians; "unsure" if the interval contains the limit."""
        if self.ratio is None:
            return "not measured"
        unsure = self.ratio.low < self.limit < self.ratio.high or self.noise > MOST_NOISE
        return ("met" if self.met else "not met") + ", unsure" * unsure


def _training() -> Iterator[Target]:
    for tokens, limit in {1: 1.00, 16: 1.00, 512: 0.98, 2048: 0.98}.items():
        yield Target(Setting(LLAMA, "training", tokens), "ours", "lora", limit)
    for tokens in (512, 2048):
        yield Target(Setting(LLAMA, "training", tokens, "bfloat16"), "ours", "lora", 0.85)
    for tokens, limit in {16: 1.00, 512: 0.98}.items():
        yield Target(Setting(LLAMA, "training", tokens, compiled=True), "ours-inductor", "lora-inductor", limit)


def _inference() -> Iterator[Target]:
    for tokens in (1, 16, 512, 2048):
        yield Target(Setting(LLAMA, "inference", tokens), "ours", "lora", 1.00)
    yield Target(Setting(LLAMA, "inference", 512, "bfloat16"), "ours", "lora", 1.00)
    yield Target(Setting(LLAMA, "generate", 16), "ours", "lora", 1.00)
    for tokens in (16, 512):
        yield Target(Setting(LLAMA, "inference", tokens), "folded", "base", 1.00, control="base-again")


def _memory() -> Iterator[Target]:
    for tokens in (512, 2048):
        yield Target(Setting(LLAMA, "memory", tokens), "ours", "lora", 1.00)


def _gram_schmidt() -> Iterator[Target]:
    for tokens in (16, 512):
        yield Target(Setting(LLAMA, "training", tokens), "ours-gs", "ours", 1.10)
    yield Target(Setting(LLAMA, "memory", 512), "ours-gs", "ours", 1.10)


def _convolutions() -> Iterator[Target]:
    for workload, images, limit in (("resnet50-224", 2, 1.05), ("resnet50", 4, 1.10)):
        for mode in STEPS:
            yield Target(Setting(workload, mode, images), "ours", "lora", limit)


TARGETS = (*_training(), *_inference(), *_memory(), *_gram_schmidt(), *_convolutions())


def findings(results: Results) -> list[Finding]:
    """All targets with the measurements of a run."""
    return [_finding(target, results.cell(target.setting)) for target in TARGETS]


def _finding(target: Target, cell: Cell | None) -> Finding:
    if cell is None:
        return Finding(target, None)
    control = cell.ratio(target.control, target.peer)
    return Finding(target, cell.ratio(target.own, target.peer), control.off_one if control else 0.0)
