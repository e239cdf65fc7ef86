"""Operators that adapters launch, per adapted layer and step, compared with PEFT's methods.

    PYTHONPATH=benchmarks python benchmarks/launches.py                      # or: make bench-launches
    PYTHONPATH=benchmarks python benchmarks/launches.py --compiled 3 12      # depths that are compiled too
    PYTHONPATH=benchmarks python benchmarks/launches.py --names ours lora    # what they launch, by operator

Needs peft. Prints Markdown tables, and which targets are met; with --docs writes docs/benchmarks_launches.md. Without
--compiled only three layers are compiled: for twelve, inductor takes many minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from speed.environment import commit, version
from speed.launch_table import table
from speed.methods import METHODS
from speed.models import DEPTHS
from speed.per_site import PerSite, per_site
from speed.running import quiet
from speed.setting import Setting

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks_launches.md"
NOTES = """\
A site is an adapted layer. Launches per site are the launches of a step of the adapted model, minus the launches of
the frozen base model, divided by the number of sites. A step is forward and backward, without the optimizer. A launch
is an operator with its own kernel, as torch's profiler records it on a CPU. Views, allocations, and operators that
such an operator calls are not counted. The numbers in parentheses are relative to PEFT LoRA. In a compiled model, a
launch is a kernel that inductor generated or an operator that it calls. `make bench-gpu` counts kernels on CUDA,
where the replay of a CUDA graph is one launch. Counts do not depend on widths. With the number of tokens, they change
by less than 3%.
"""


@dataclass(frozen=True)
class Kind:
    """Models that differ in their number of layers.

    Attributes:
        title: of the table.
        workload: a key of `WORKLOADS`, without the number of layers.
        size: tokens or images.
        methods: keys of `METHODS`.
    """

    title: str
    workload: str
    size: int
    methods: tuple[str, ...]

    def counted(self, layers: int, *, compiled: bool) -> PerSite:
        methods = [key for key in self.methods if key in COMPILED] if compiled else self.methods
        return per_site(Setting(f"{self.workload}x{layers}", "gradients", self.size, compiled=compiled), methods)


COMPILED = ("lora", "ours", "ours-gs")
LLAMA = Kind(
    "Llama, d=64: q, k, v, gate and up of each layer",
    "llama-64",
    16,
    ("lora", "dora", "oft", "peft-hra", "ours", "ours-gs"),
)
CONVOLUTIONS = Kind(
    "Convolutions, 3x3, 16 channels", "convolutions-16", 2, ("lora", "dora", "peft-hra", "ours", "ours-gs")
)
#: For the Llama of 12 layers: a method, and how much of PEFT LoRA's launches it may have.
TARGETS = {"ours": 0.80, "ours-gs": 1.20}
TARGET_DEPTH = 12


def verdicts(one: PerSite) -> Iterator[str]:
    """Which targets are met."""
    peer = one.total("lora")
    for key, limit in TARGETS.items():
        own = one.total(key)
        words = f"{METHODS[key].title} / {METHODS['lora'].title}, Llama of {TARGET_DEPTH} layers, r=8"
        if own is None or not peer:
            yield f"- not measured: {words}; limit {limit:.2f}"
        else:
            yield f"- {'met' if own / peer <= limit else '**NOT met**'}: {words}: {own / peer:.2f}; limit {limit:.2f}"


def by_name(one: PerSite, keys: Sequence[str]) -> Iterator[str]:
    """What methods launch per site."""
    for key in keys:
        yield f"{METHODS[key].title}, {one.setting}:"
        for name, count in sorted(one.launches.get(key, {}).items(), key=lambda item: -abs(item[1])):
            yield f"  {count:8.2f}  {name}"


def lines(options: argparse.Namespace) -> Iterator[str]:
    """The tables and verdicts, as they are measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    yield from (f"{versions}; commit {commit()}.", "", NOTES)
    for kind in (LLAMA, CONVOLUTIONS):
        found = {layers: kind.counted(layers, compiled=False) for layers in options.layers}
        yield from table(f"{kind.title}, r=8", {f"{layers} layers": one for layers, one in found.items()})
        for one in found.values():
            yield from by_name(one, [key for key in options.names if key in kind.methods])
        if kind is LLAMA and TARGET_DEPTH in found:
            yield from (*verdicts(found[TARGET_DEPTH]), "")
    if options.compiled:
        compiled = {f"{layers} layers": LLAMA.counted(layers, compiled=True) for layers in options.compiled}
        yield from table(f"{LLAMA.title}, r=8, compiled by inductor", compiled)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=DEPTHS, choices=DEPTHS, help="depths of the models")
    parser.add_argument("--compiled", type=int, nargs="*", default=[3], choices=DEPTHS, help="those compiled too")
    parser.add_argument("--names", nargs="*", default=[], choices=METHODS, help="print what these methods launch")
    parser.add_argument("--docs", type=Path, nargs="?", const=PAGE, help="write the page, or the given file")
    options = parser.parse_args(arguments)
    written = list[str]()
    with quiet():
        for line in lines(options):
            print(line, flush=True)
            written.append(line)
    if options.docs:
        head = ["# Launched operators", "", "Written by `make bench-launches`; do not edit.", ""]
        options.docs.write_text("\n".join([*head, *written]).rstrip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
