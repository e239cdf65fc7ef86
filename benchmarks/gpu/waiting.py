"""Whether the host waits for the device in a training step, or when adapters are switched.

On a CPU, where nothing waits, operators whose result depends on values are looked for: on CUDA the host waits in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from speed.methods import METHODS
from speed.models import WORKLOADS
from speed.setting import Setting
from speed.steps import plain_model, run_of
from speed.timing import reason
from torch.profiler import ProfilerActivity, profile

from gpu.report import Check

METHODS_CHECKED = ("base", "lora", "ours", "ours-gs")
GROUP = "The host does not wait for the device"


def waiting(settings: list[Setting]) -> Iterator[Check]:
    """Check forward and backward of methods, with the base model for comparison, and `set_adapter`.

    Args:
        settings: of mode `gradients`.
    """
    for setting in settings:
        title = WORKLOADS[setting.workload].title
        for key in METHODS_CHECKED:
            method = METHODS[key]
            model = method.put(plain_model(setting), WORKLOADS[setting.workload], setting.r)
            yield _checked(f"{title}, forward and backward: {method.title}", run_of(model, method, setting), setting)
    yield _checked(f"{title}, `set_adapter`, forward and backward: hra_fx", _switching(settings[-1]), settings[-1])


def _switching(setting: Setting) -> Callable[[], object]:
    """Steps with another adapter, and with two."""
    import hra_fx

    workload = WORKLOADS[setting.workload]
    model = METHODS["ours"].put(plain_model(setting), workload, setting.r)
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=setting.r, target_modules=workload.targets))
    step = run_of(model, METHODS["ours"], setting)

    def switch_and_step() -> None:
        for names in ("other", ["default", "other"], "default"):
            hra_fx.set_adapter(model, names)
            step()

    return switch_and_step


def _checked(words: str, run: Callable[[], object], setting: Setting) -> Check:
    run()  # libraries may wait when they are loaded
    if setting.device == "cpu":
        found = sorted(reading_values(run))
        return Check(GROUP, words, not found, f"on a CPU, operators that read values: {', '.join(found) or 'none'}")
    try:
        with _waiting_is_an_error():
            run()
    except RuntimeError as error:
        return Check(GROUP, words, False, reason(error))
    return Check(GROUP, words, True, "")


def reading_values(run: Callable[[], object]) -> set[str]:
    """The operators of one run whose result, or its shape, depends on values."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    # `index` is tagged for masks, of which it calls `nonzero`.
    names = {event.key for event in profiler.key_averages() if event.key.startswith("aten::")} - {"aten::index"}
    return {name for name in names if _reads_values(getattr(torch.ops.aten, name.removeprefix("aten::")))}


def _reads_values(packet: Any) -> bool:
    tags = {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    set_mode: Any = torch.cuda.set_sync_debug_mode
    set_mode("error")
    try:
        yield
    finally:
        set_mode("default")
