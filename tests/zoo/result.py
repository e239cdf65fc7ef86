"""What the zoo found out about one model."""

from __future__ import annotations

from dataclasses import dataclass, field

#: The checks, in the order in which they are made, and what the table says above them.
CHECKS = {
    "transform": "transform",
    "start": "start",
    "eval": "random",
    "train": "train",
    "gradients": "grads",
    "batch": "batch",
    "size": "size",
    "deepcopy": "copy",
    "state_dict": "state",
    "trace": "trace",
    "fold": "fold",
}
OK, NOT_APPLICABLE = "ok", "-"
YES, LEAVES = "torch.fx", "layers"
#: Like `LEAVES`, with layers in a part that runs one graph in each mode, which a pass does not see.
HIDDEN = "layers, some by mode"
#: How the text of a check begins that ended in a refusal, with a reason and without any change.
REFUSED = "refused: "


@dataclass
class Result:
    """One model's row.

    Attributes:
        name: `"<library>/<model>"`.
        matched: adapted layers.
        traced: how `transform(trace=True)` makes a graph: `YES` (by torch.fx), `LEAVES` (by torch.export, with layers
            as leaves), `HIDDEN` or `REFUSED` with the reason.
        refused: layer -> why `transform` refused it.
        checks: name -> "ok", "-" (not applicable), "refused: ..." or what went wrong.
        inert: layers whose vectors get no gradient, while those of the oracle do.
        untouched: layers whose vectors change no output, in the oracle either: not called, or of one dimension.
        notes: why a check is not applicable, and what else is to be known.
        dtype: in which the model was run.
        first_s: seconds of the first `transform`.
        transform_s: those of the better one of two, to compare with the next.
        trace_s: seconds of `torch.fx.symbolic_trace` of the same model; `None` where that fails.
        seconds: of everything.
        cpu_s: seconds of one core that the model's process took; other programs beside it hardly change them.
    """

    name: str
    matched: int = 0
    traced: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    inert: list[str] = field(default_factory=list)
    untouched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dtype: str = ""
    first_s: float = 0.0
    transform_s: float = 0.0
    trace_s: float | None = None
    seconds: float = 0.0
    cpu_s: float = 0.0

    @property
    def failures(self) -> dict[str, str]:
        """The checks that went wrong."""
        return {
            name: text
            for name, text in self.checks.items()
            if text not in (OK, NOT_APPLICABLE) and not text.startswith(REFUSED)
        }

    @property
    def right(self) -> bool:
        """Whether nothing went wrong, and something was looked at."""
        return bool(self.checks) and not self.failures and not self.inert

    @property
    def ratio(self) -> float | None:
        """`transform` against `symbolic_trace`."""
        return self.transform_s / self.trace_s if self.trace_s else None

    def line(self) -> str:
        """One line for a terminal."""
        state = "ok   " if self.right else "WRONG"
        refused = f", {len(self.refused)} refused" if self.refused else ""
        traced = ", traced" if self.traced == YES else ""
        text = f"{state} {self.name}: {self.matched} layers{refused}{traced}, {self.seconds:.1f}s"
        troubles = [f"{name}: {what}" for name, what in self.failures.items()]
        if self.inert:
            troubles.append(f"inert: {', '.join(self.inert[:4])}")
        return "\n      ".join([text, *troubles])
