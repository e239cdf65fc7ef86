"""Any training loop trains in pairs: against the same loop over sums and differences, with dense products `W Q`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import adapting
import bitsandbytes
import pytest
import torch
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from transformers.optimization import Adafactor

F32, F64 = torch.float32, torch.float64
STEPS = 10
AdamW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
Call = Callable[[Tensor], Tensor]


def base(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)


def adapted(dtype: torch.dtype = F64) -> Any:
    """Two layers in pairs, a convolution among them, and one of an odd rank, which trains vectors."""
    return adapting.adapted(base(dtype), "0", "3", "5", r=4, rank_pattern={"5": 3})


class Dense:
    """The model by definition: parameters are sums and differences, and a call multiplies each weight by `Q`.

    With `joint`, sums and differences are one tensor `(d, r / 2, 2)`, for optimizers that look at more than one entry.
    """

    def __init__(self, model: Any, *, joint: bool) -> None:
        self.base = base(model[0].weight.dtype)
        self.held: dict[str, list[nn.Parameter]] = {}
        for path in "035":
            trained = model.get_submodule(path).hra_u["default"].detach().clone()
            parts = [trained] if joint or trained.dim() == 2 else [*trained.unbind(-1)]
            self.held[path] = [nn.Parameter(part.contiguous()) for part in parts]

    def parameters(self) -> list[nn.Parameter]:
        return [part for parts in self.held.values() for part in parts]

    def trained(self) -> dict[str, Tensor]:
        return {path: parts[0] if len(parts) == 1 else torch.stack(parts, -1) for path, parts in self.held.items()}

    def __call__(self, x: Tensor) -> Tensor:
        weights = {}
        for path, trained in self.trained().items():
            weight = self.base.get_submodule(path).weight
            weights[f"{path}.weight"] = dense_weight(weight, dense_q(trained)).to(weight.dtype)  # type: ignore[arg-type]
        return functional_call(self.base, weights, x)  # type: ignore[no-any-return]


def train(call: Call, optimizer: Any, dtype: torch.dtype, *options: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled="scaled" in options)
    if "scheduled" in options:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS)
    for step in range(STEPS):
        torch.manual_seed(step)
        micro_batches = torch.randn(3 if "accumulated" in options else 1, 8, 2, 4, 4, dtype=dtype)

        def closure(micro_batches: Tensor = micro_batches, step: int = step) -> Tensor:
            optimizer.zero_grad()
            losses = [call(x).square().mean() / len(micro_batches) for x in micro_batches]
            for loss in losses:
                # The fourth step is skipped, because gradients are infinite.
                scaler.scale(loss * (torch.inf if scaler.is_enabled() and step == 3 else 1)).backward()
            return torch.stack(losses).sum()

        if "closure" in options:
            optimizer.step(closure)
            continue
        closure()
        if "clipped" in options:
            assert torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-2) > 1e-2
        scaler.step(optimizer)
        scaler.update()
        if "scheduled" in options:
            schedule.step()


#: Optimizer, dtype, whether the optimizer looks at more than one entry, and options of `train`.
LOOPS: dict[str, tuple[Any, ...]] = {
    "AdamW, for loop": (partial(AdamW, foreach=False), F64, False),
    "AdamW, foreach": (partial(AdamW, foreach=True), F64, False),
    "AdamW, fused": (partial(AdamW, fused=True), F64, False),
    "SGD": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), F64, False),
    "Adafactor": (partial(torch.optim.Adafactor, lr=0.02), F64, True),
    "Adafactor of transformers": (partial(Adafactor, lr=0.02, relative_step=False), F64, True),
    "LBFGS": (partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"), F64, False, "closure"),
    "AdamW in 8 bits": (partial(bitsandbytes.optim.AdamW8bit, lr=0.02, min_8bit_size=16), F32, True),
    "clipped, accumulated, scheduled": (AdamW, F64, False, "clipped", "accumulated", "scheduled"),
    "a scaler skips a step": (partial(AdamW, fused=True), F32, False, "scaled"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_sums_and_differences(name: str) -> None:
    make, dtype, joint, *options = LOOPS[name]
    model = adapted(dtype)
    dense = Dense(model, joint=joint)
    start = {path: trained.detach().clone() for path, trained in dense.trained().items()}
    train(model, make([one for one in model.parameters() if one.requires_grad]), dtype, *options)
    train(dense, make(dense.parameters()), dtype, *options)
    for path, wanted in dense.trained().items():
        found = model.get_submodule(path).hra_u["default"]
        assert relative_error(found, wanted) < (1e-9 if dtype is F64 else 1e-4), path
        assert relative_error(found, start[path]) > 1e-2, path
