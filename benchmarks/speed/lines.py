"""The lines that must hold: each is a ratio of two methods in one setting, and the most it may be."""

from __future__ import annotations

from dataclasses import dataclass

from speed.grid import STEPS
from speed.methods import ALL
from speed.models import WORKLOADS
from speed.ratios import Ratio
from speed.results import Cell, Results
from speed.setting import Setting

TITLES = {
    1: "Training step",
    2: "Training step, compiled",
    3: "Memory, and what Gram-Schmidt costs",
    4: "Inference",
    5: "Convolutions",
}


@dataclass(frozen=True)
class Line:
    """One of them.

    Attributes:
        group: under which title it stands.
        setting: where it is measured.
        own: the method that it is about.
        peer: whom it is compared with.
        limit: the most that the ratio may be.
        control: a method that is the same as `peer`; its distance from it is the noise, and may be added to the limit.
    """

    group: int
    setting: Setting
    own: str
    peer: str
    limit: float
    control: str = ""

    @property
    def words(self) -> str:
        """What is compared, where."""
        setting, what = self.setting, {"memory": ", peak memory"}.get(self.setting.mode, f", {self.setting.mode}")
        workload = WORKLOADS[setting.workload]
        where = f"{workload.title}, {setting.size} {workload.unit}{what}"
        return f"{where}: {ALL[self.own].title} / {ALL[self.peer].title}"

    @property
    def base(self) -> str:
        """The frozen base as it is run here; none where it is the peer."""
        base = "base-inductor" if self.setting.compiled else "base"
        return "" if self.peer == base else base


#: The most that a control may add to a limit: beyond it nothing can be said of so few percent.
MOST_NOISE = 0.05


@dataclass(frozen=True)
class Finding:
    """A line, with what was measured.

    Attributes:
        line: what is asked.
        ratio: of the method that it is about to its peer.
        noise: how far the control was from its like.
        floor: of the frozen base to the same peer.
    """

    line: Line
    ratio: Ratio | None
    noise: float = 0.0
    floor: Ratio | None = None

    @property
    def limit(self) -> float:
        return self.line.limit + min(self.noise, MOST_NOISE)

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio.median <= self.limit

    @property
    def below_floor(self) -> bool:
        """Whether the limit is less than the frozen base takes."""
        return self.floor is not None and self.floor.median > self.limit

    @property
    def verdict(self) -> str:
        """By the medians; unsure where an interval lies on both sides of the limit."""
        if self.ratio is None:
            return "not measured"
        word = ("met" if self.met else "NOT met") + self._unsure(self.ratio)
        if self.met or self.floor is None or not self.below_floor:
            return word
        return f"{word} (nor by the base{self._unsure(self.floor)})"

    def _unsure(self, ratio: Ratio) -> str:
        return ", unsure" * (ratio.low < self.limit < ratio.high or self.noise > MOST_NOISE)


def _lines() -> tuple[Line, ...]:
    llama = "llama-768x3"
    many, few = Setting(llama, "training", 512), Setting(llama, "training", 16)
    # "One layer of width 4096" may mean one of a Llama's, or a Linear.
    wide = [Setting(workload, "training", 64) for workload in ("llama-4096x1", "linear-4096")]
    memory = Setting(llama, "memory", 512)
    inference = [Setting(llama, "inference", tokens) for tokens in (512, 16)]
    convolutions = (("resnet50", 4), ("resnet50-224", 2))
    images = [Setting(workload, mode, count) for workload, count in convolutions for mode in STEPS]
    return (
        Line(1, many, "ours", "lora", 1.00),
        Line(1, many, "ours", "base", 1.02),
        Line(1, many, "ours", "peft-hra", 0.35),
        Line(1, few, "ours", "lora", 0.97),
        Line(1, few, "ours", "peft-hra", 0.05),
        *(Line(1, setting, "ours", "peft-hra", 0.0085) for setting in wide),
        *_compiled("ours-inductor"),
        *_compiled("ours-passes"),
        Line(3, memory, "ours", "lora", 1.00),
        Line(3, memory, "ours-gs", "ours", 1.10),
        *(Line(3, setting, "ours-gs", "ours", 1.10) for setting in (many, few)),
        *(Line(4, setting, "ours", "lora", 1.00) for setting in inference),
        *(Line(4, setting, "folded", "base", 1.00, control="base-again") for setting in inference),
        *(Line(5, setting, "ours", "lora", 1.00) for setting in images),
    )


def _compiled(own: str) -> tuple[Line, ...]:
    many, few = (Setting("llama-768x3", "training", tokens, compiled=True) for tokens in (512, 16))
    return (
        Line(2, many, own, "lora-inductor", 1.00),
        Line(2, many, own, "base-inductor", 1.02),
        Line(2, few, own, "lora-inductor", 0.97),
    )


LINES = _lines()


def findings(results: Results) -> list[Finding]:
    """Every line, with what a run says of it."""
    return [_finding(line, results.cell(line.setting)) for line in LINES]


def _finding(line: Line, cell: Cell | None) -> Finding:
    if cell is None:
        return Finding(line, None)
    measured, control, floor = (cell.ratio(own, line.peer) for own in (line.own, line.control, line.base))
    return Finding(line, measured, control.off_one if control else 0.0, floor)
