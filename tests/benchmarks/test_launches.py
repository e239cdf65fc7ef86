"""Launches: which events count, and what adapters launch per layer, against counts by hand and by a dispatch mode."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import launches
import pytest
import torch
from speed.launches import GENERATED, launch_calls, operators, within
from speed.methods import METHODS
from speed.models import WORKLOADS, linear
from speed.per_site import PerSite, adapted_layers, per_site
from speed.setting import Setting
from speed.steps import plain_model, run_of
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

X = torch.randn(4, 6)
W = torch.randn(6, 6, requires_grad=True)


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda: X.T.unsqueeze(0).expand(3, 6, 4).reshape(3, 24).detach(), {"aten::copy_": 1}),
        (lambda: X.view(2, 12).chunk(2, dim=1), {}),
        (lambda: torch.empty_like(X).resize_(3, 3).t_(), {}),
        (lambda: X.contiguous().to(torch.float32), {}),
        (lambda: X.to(torch.bfloat16), {"aten::copy_": 1}),
        (lambda: X * 2.0, {"aten::mul": 1}),
        (lambda: torch.zeros(3), {"aten::zero_": 1}),
        (lambda: torch.nn.functional.linear(X, W.detach(), X[0]), {"aten::addmm": 1}),
        # The gradient of a sum is one, expanded.
        (lambda: (X @ W).sum().backward(), {"aten::mm": 2, "aten::sum": 1, "aten::fill_": 1}),
    ],
)
def test_operators_that_compute_are_launches(run: Callable[[], object], wanted: dict[str, int]) -> None:
    W.grad = None
    assert operators(run) == wanted


def test_generated_kernels_are_launches_and_other_events_are_not() -> None:
    @dataclasses.dataclass
    class Event:
        name: str
        cpu_children: Sequence[Event] = ()

    names = ("graph_0_cpp_fused_add_mul_0", "AddmmBackward0", "autograd::engine::evaluate_function: AddmmBackward0")
    assert list(within(Event("Torch-Compiled Region: 0/0", list(map(Event, names))))) == [GENERATED]


def test_kernels_are_counted_by_the_calls_that_launch_them() -> None:
    @dataclasses.dataclass
    class Event:
        key: str
        count: int

    launched = {"cudaLaunchKernel": 3, "cuLaunchKernelEx": 2, "cudaGraphLaunch": 1}
    others = {"cudaMemcpyAsync": 7, "cudaGraphInstantiate": 1, "aten::mm": 5}
    assert launch_calls(Event(key, count) for key, count in (launched | others).items()) == Counter(launched)


def test_lora_on_one_layer_launches_what_one_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "linear-16", linear(16))
    found = per_site(Setting("linear-16", "gradients", 4), ["lora"])
    # Forward: A, B, the scale, the sum. Backward: the scale, a product for A, for B and for each of their inputs, and
    # the sum of the gradients of the input.
    assert found.left_out == {}
    assert found.total("lora") == 10
    assert found.launches["lora"]["aten::mm"] == 6
    assert found.launches["lora"]["aten::mul"] == 2


class _Counting(TorchDispatchMode):
    """Counts the operators that reach the backend and are not views, those of backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in func.name() and "_unsafe_view" not in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_launches_per_site_are_those_that_a_dispatch_mode_sees(key: str) -> None:
    setting = Setting("llama-64x1", "gradients", 4)
    seen = dict[str, int]()
    for one in ("base", key):
        run = run_of(METHODS[one].put(plain_model(setting), WORKLOADS[setting.workload], 8), METHODS[one], setting)
        run()
        with _Counting() as mode:
            run()
        seen[one] = mode.count
    assert per_site(setting, [key]).total(key) == pytest.approx((seen[key] - seen["base"]) / 5)


@pytest.mark.parametrize("workload", ["llama-64x3", "convolutions-16x12", "resnet-blocks-32"])
def test_sites_are_the_layers_that_transform_adapts(workload: str) -> None:
    model = METHODS["ours"].put(plain_model(Setting(workload, "gradients", 1)), WORKLOADS[workload], 4)
    adapted = [name.removesuffix(".hra_u.default") for name, _ in model.named_parameters() if "hra_u" in name]
    assert adapted_layers(workload) == adapted != []


@pytest.mark.slow
def test_a_compiled_model_launches_generated_kernels_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "linear-16", linear(16))
    found = per_site(Setting("linear-16", "gradients", 4, compiled=True), ["lora"])
    assert found.left_out == {}
    # The six products, one of which adds to another, and the scale in forward and in backward.
    launched = found.launches["lora"]
    assert launched == {"aten::mm": 5, "aten::addmm": 1, GENERATED: 2}


def counted(**totals: float) -> PerSite:
    launched = {key.replace("_", "-"): {"aten::mm": total} for key, total in totals.items()}
    return PerSite(Setting("llama-64x12", "gradients", 16), 100, launched, {"PEFT OFT": "ValueError: no"})


def test_targets_are_met_up_to_their_limits() -> None:
    met, missed = launches.verdicts(counted(lora=10, ours=8, ours_gs=12.1))
    assert met == "- met: hra_fx / PEFT LoRA, Llama of 12 layers, r=8: 0.80; limit 0.80"
    assert missed.startswith("- **NOT met**: hra_fx, GS / PEFT LoRA") and missed.endswith("1.21; limit 1.20")
    assert all(line.startswith("- not measured") for line in launches.verdicts(counted(lora=10)))


@pytest.mark.slow
def test_the_page_has_both_kinds_of_models(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert launches.main(["--layers", "3", "--compiled", "--names", "ours", "--docs", str(page)]) == 0
    text = page.read_text()
    assert text.count("\n### ") == 2
    assert all(f"| {METHODS[key].title} | " in text for key in launches.LLAMA.methods)
    assert "Left out" not in text
    assert "aten::mm" in text
