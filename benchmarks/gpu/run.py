"""The parts of a run, one after another: correctness first. A part that fails is recorded, and the next one runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

import graphs as mode
import host
from speed.grid import Job
from speed.launches import kernels, operators
from speed.measuring import carry_out
from speed.per_site import per_site
from speed.results import Cell
from speed.timing import Budget, Measured, reason

from gpu.correctness import correctness
from gpu.graphs import compiled, graphs
from gpu.plan import Plan
from gpu.report import Check, Ratio, Report
from gpu.waiting import waiting

#: Of the time of a setting, for its rounds; the rest is for making models and warming up.
FOR_ROUNDS = 0.5
NEEDS_CUDA = "needs CUDA"
HOST = "Host time that adapters add in a tiny Llama, relative to PEFT LoRA"
GRAPH_MODE = "A training step of a graph of `transform(trace=True)`, relative to eager mode"


class WrongResult(Exception):
    """An adapted layer computed something else than the float64 product."""


class Run:
    """A run in progress.

    Attributes:
        report: what it has found.
    """

    def __init__(self, plan: Plan, report: Report, budget: float, save: Callable[[], None]) -> None:
        """Set up.

        Args:
            plan: what to do.
            report: where results go.
            budget: seconds for all of it.
            save: writes the report.
        """
        self.report = report
        self._plan, self._budget, self._save = plan, budget, save
        self._begin = time.monotonic()

    def all(self) -> None:
        """Do all parts.

        Raises:
            WrongResult: the first part found an error; nothing is measured then.
        """
        plan = self._plan
        checks = correctness(plan.device, plan.width, plan.channels)
        wrong = [check for check in self._checks(checks) if not check.holds]
        if wrong:
            raise WrongResult("; ".join(f"{check.words}: {check.detail}" for check in wrong))
        self._part("waiting", lambda: self._checks(waiting(plan.waiting)))
        self._part("CUDA graphs", lambda: self._checks(graphs(plan.graphs)))
        self._part("reduce-overhead", lambda: self._checks(compiled(plan.graphs[0])))
        self._part("host time", self._host)
        self._part("graph mode", self._graph_mode)
        self._part("launches", self._launches)
        self._part("steps", self._steps)

    def _part(self, name: str, part: Callable[[], object]) -> None:
        self._tell(name)
        try:
            part()
        except Exception as error:
            self.report.failures[name] = reason(error)
            self._tell(f"{name}: {reason(error)}")
        self._save()

    def _checks(self, checks: Iterable[Check]) -> list[Check]:
        made = list[Check]()
        for check in checks:
            made.append(check)
            self.report.checks.append(check)
            self._tell(f"{check.words}: {check.verdict} ({check.detail})" if check.detail else f"{check.words}: yes")
            self._save()
        return made

    def _host(self) -> None:
        made = host.models(self._plan.host_blocks)
        for model in made.values():
            model.to(self._plan.device)
        rounds = dict.fromkeys(host.ROUNDS, min(10, self._plan.rounds))
        for what, found in host.added(made, rounds):
            self._ratios(HOST, {f"{what}: {name}": value for name, value in found.items()})

    def _graph_mode(self) -> None:
        for width, layers, batch, length in self._plan.graph_steps:
            size = f"Llama of {layers} layers of width {width}, {batch} x {length} tokens"
            rounds = min(10, self._plan.rounds)
            with_adapters, plain = mode.steps(width, layers, batch, length, rounds=rounds, device=self._plan.device)
            self._ratios(GRAPH_MODE, {f"{size}, with adapters": with_adapters, f"{size}, without": plain})

    def _ratios(self, group: str, found: dict[str, float]) -> None:
        self.report.ratios += [Ratio(group, words, value) for words, value in found.items()]
        self._tell(", ".join(f"{words} {value:.2f}" for words, value in found.items()))
        self._save()

    def _launches(self) -> None:
        units = {"operators": operators} | ({"kernels": kernels} if self._plan.device == "cuda" else {})
        for setting, methods in self._plan.launches:
            for unit, count in units.items():
                self._tell(f"{unit} of {setting}")
                self.report.launches.setdefault(unit, []).append(per_site(setting, methods, count))
                self._save()

    def _steps(self) -> None:
        measured = self._plan.measured
        for place, (setting, methods) in enumerate(measured):
            left = self._budget - self._elapsed()
            self._tell(f"[{place + 1}/{len(measured)}] {setting}")
            seconds = FOR_ROUNDS * left / (len(measured) - place)
            budget = Budget(seconds, least=min(3, self._plan.rounds), most=self._plan.rounds, least_slow=2)
            self.report.cells.append(self._cell(Job(setting, methods, budget), left))
            self._save()

    def _cell(self, job: Job, left: float) -> Cell:
        needed = job.setting.mode in ("graphed", "memory") and job.setting.device == "cpu"
        why = NEEDS_CUDA if needed else "no time was left" if left <= 0 else ""
        if not why:
            try:
                return carry_out(job)
            except Exception as error:
                why = reason(error)
        self._tell(f"left out: {why}")
        return Cell(job.setting, Measured(left_out=dict.fromkeys(job.methods, why)))

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _tell(self, words: str) -> None:
        print(f"[{self._elapsed():6.1f} s] {words}", file=sys.stderr, flush=True)


def verdicts(report: Report) -> Iterator[str]:
    """What was found wrong or failed."""
    yield from (
        f"{check.group}: not so for {check.words} ({check.detail})" for check in report.checks if check.holds is False
    )
    yield from (f"{part} ended with {why}" for part, why in report.failures.items())
