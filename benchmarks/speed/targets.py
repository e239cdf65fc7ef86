"""The performance targets: each is a ratio of two methods in one setting, with an upper limit."""

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
    3: "Memory, and the cost of Gram-Schmidt",
    4: "Inference",
    5: "Convolutions",
}


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        group: a key of `TITLES`.
        setting: the setting that is measured.
        own: the method with the target.
        peer: the method that it is compared with.
        limit: the upper limit of the ratio.
        control: a copy of `peer`; its difference from `peer` is the noise, which is added to the limit.
    """

    group: int
    setting: Setting
    own: str
    peer: str
    limit: float
    control: str = ""

    @property
    def words(self) -> str:
        """A description of the target."""
        setting, what = self.setting, {"memory": ", peak memory"}.get(self.setting.mode, f", {self.setting.mode}")
        workload = WORKLOADS[setting.workload]
        where = f"{workload.title}, {setting.size} {workload.unit}{what}"
        return f"{where}: {ALL[self.own].title} / {ALL[self.peer].title}"

    @property
    def base(self) -> str:
        """The frozen base model in this setting; "" if it is the peer."""
        base = "base-inductor" if self.setting.compiled else "base"
        return "" if self.peer == base else base


#: The maximal noise that is added to a limit. With more noise the result is unsure.
MOST_NOISE = 0.05


@dataclass(frozen=True)
class Finding:
    """A target and its measurement.

    Attributes:
        target: the target.
        ratio: of the method to its peer.
        noise: the difference of the control from the peer.
        floor: the ratio of the frozen base model to the same peer.
    """

    target: Target
    ratio: Ratio | None
    noise: float = 0.0
    floor: Ratio | None = None

    @property
    def limit(self) -> float:
        return self.target.limit + min(self.noise, MOST_NOISE)

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio.median <= self.limit

    @property
    def below_floor(self) -> bool:
        """Whether even the frozen base model does not reach the limit."""
        return self.floor is not None and self.floor.median > self.limit

    @property
    def verdict(self) -> str:
        """The result by the medians; "unsure" if the interval contains the limit."""
        if self.ratio is None:
            return "not measured"
        word = ("met" if self.met else "NOT met") + self._unsure(self.ratio)
        if self.met or self.floor is None or not self.below_floor:
            return word
        return f"{word} (nor by the frozen base{self._unsure(self.floor)})"

    def _unsure(self, ratio: Ratio) -> str:
        return ", unsure" * (ratio.low < self.limit < ratio.high or self.noise > MOST_NOISE)


def _targets() -> tuple[Target, ...]:
    llama = "llama-768x3"
    many, few = Setting(llama, "training", 512), Setting(llama, "training", 16)
    # A layer of width 4096: one of a Llama, and one Linear.
    wide = [Setting(workload, "training", 64) for workload in ("llama-4096x1", "linear-4096")]
    memory = Setting(llama, "memory", 512)
    inference = [Setting(llama, "inference", tokens) for tokens in (512, 16)]
    convolutions = (("resnet50", 4), ("resnet50-224", 2))
    images = [Setting(workload, mode, count) for workload, count in convolutions for mode in STEPS]
    return (
        Target(1, many, "ours", "lora", 1.00),
        Target(1, many, "ours", "base", 1.02),
        Target(1, many, "ours", "peft-hra", 0.35),
        Target(1, few, "ours", "lora", 0.97),
        Target(1, few, "ours", "peft-hra", 0.05),
        *(Target(1, setting, "ours", "peft-hra", 0.0085) for setting in wide),
        *_compiled("ours-inductor"),
        *_compiled("ours-passes"),
        Target(3, memory, "ours", "lora", 1.00),
        Target(3, memory, "ours-gs", "ours", 1.10),
        *(Target(3, setting, "ours-gs", "ours", 1.10) for setting in (many, few)),
        *(Target(4, setting, "ours", "lora", 1.00) for setting in inference),
        *(Target(4, setting, "folded", "base", 1.00, control="base-again") for setting in inference),
        *(Target(5, setting, "ours", "lora", 1.00) for setting in images),
    )


def _compiled(own: str) -> tuple[Target, ...]:
    many, few = (Setting("llama-768x3", "training", tokens, compiled=True) for tokens in (512, 16))
    return (
        Target(2, many, own, "lora-inductor", 1.00),
        Target(2, many, own, "base-inductor", 1.02),
        Target(2, few, own, "lora-inductor", 0.97),
    )


TARGETS = _targets()


def findings(results: Results) -> list[Finding]:
    """All targets with the measurements of a run."""
    return [_finding(target, results.cell(target.setting)) for target in TARGETS]


def _finding(target: Target, cell: Cell | None) -> Finding:
    if cell is None:
        return Finding(target, None)
    measured, control, floor = (cell.ratio(own, target.peer) for own in (target.own, target.control, target.base))
    return Finding(target, measured, control.off_one if control else 0.0, floor)
