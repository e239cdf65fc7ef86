"""Training steps in a CUDA graph and under `torch.compile(mode="reduce-overhead")`: gradients equal to eager ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from speed.cuda_graph import captured
from speed.measuring import start_compiling_anew
from speed.methods import METHODS, REDUCED, Method
from speed.models import WORKLOADS
from speed.setting import Setting
from speed.steps import plain_model, run_of
from speed.timing import reason
from torch import Tensor, nn

from gpu.correctness import relative_error
from gpu.report import Check

TOLERANCE = 1e-4
METHODS_CHECKED = ("lora", "ours", "ours-gs")
GRAPH = "The gradients of a captured step are those of the eager one"
COMPILED = 'The gradients under `torch.compile(mode="reduce-overhead")` are those of the eager step'


#: Of a model and its eager step: the step that is compared with it.
Make = Callable[[nn.Module, Callable[[], object]], Callable[[], object]]


def graphs(settings: list[Setting]) -> Iterator[Check]:
    """Check that steps can be captured.

    Args:
        settings: of mode `gradients` in float32.
    """
    for setting in settings:
        for key in METHODS_CHECKED:
            yield _checked(GRAPH, setting, key, lambda model, eager: captured(eager).replay)


def compiled(setting: Setting) -> Iterator[Check]:
    """Check that steps can be compiled with CUDA graphs."""
    for key in ("ours", "ours-gs"):
        yield _checked(COMPILED, setting, key, _compiled(REDUCED[f"{key}-reduced"], setting))


def _compiled(method: Method, setting: Setting) -> Make:
    def make(model: nn.Module, eager: Callable[[], object]) -> Callable[[], object]:
        start_compiling_anew()
        return run_of(model, method, setting)

    return make


def _checked(group: str, setting: Setting, key: str, make: Make) -> Check:
    """Compare the gradients of the step that `make` creates with those of the eager step of the same model."""
    method, workload = METHODS[key], WORKLOADS[setting.workload]
    words = f"{workload.title}: {method.title}"
    if setting.device == "cpu":
        return Check(group, words, None, "needs CUDA")
    try:
        model = method.put(plain_model(setting), workload, setting.r)
        _move_off_start(model)
        error = largest_error(model, run_of(model, method, setting), make)
    except Exception as failure:
        return Check(group, words, False, reason(failure))
    return Check(group, words, error <= TOLERANCE, f"largest relative error {error:.1e}")


def largest_error(model: nn.Module, eager: Callable[[], object], make: Make) -> float:
    """The largest relative error of a gradient; infinite if one is missing, NaN if one is NaN."""
    eager()
    wanted = _gradients(model)
    step = make(model, eager)
    for _ in range(3):
        step()
    found = _gradients(model)
    if found.keys() != wanted.keys() or not wanted:
        return float("inf")
    return float(torch.tensor([relative_error(found[name], wanted[name].double()) for name in wanted]).max())


def _move_off_start(model: nn.Module) -> None:
    """Move the adapters, some of whose gradients are zero at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.02)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
