"""A training loop trains pairs: against the same loop over sums and differences, with dense products `W Q`."""

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

F32, F64 = torch.float32, torch.float64
#: Optimizer, dtype, and whether gradients are clipped.
LOOPS: dict[str, tuple[Any, torch.dtype, bool]] = {
    "AdamW, fused": (partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, fused=True), F64, False),
    "SGD, clipped": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), F64, True),
    "Adafactor": (partial(torch.optim.Adafactor, lr=0.02), F64, False),
    "LBFGS": (partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe"), F64, False),
    "AdamW in 8 bits": (partial(bitsandbytes.optim.AdamW8bit, lr=0.02, min_8bit_size=16), F32, False),
}


def base(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(*layers).to(dtype)


def train(call: Callable[[Tensor], Tensor], optimizer: Any, dtype: torch.dtype, clipped: bool) -> None:
    for step in range(10):
        torch.manual_seed(step)
        x = torch.randn(8, 2, 4, 4, dtype=dtype)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = call(x).square().mean()
            loss.backward()
            if clipped:
                assert torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-2) > 1e-2
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_sums_and_differences(name: str) -> None:
    """Two layers in pairs, a convolution among them, and one of an odd rank, which trains vectors."""
    make, dtype, clipped = LOOPS[name]
    plain, model = base(dtype), adapting.adapted(base(dtype), "0", "3", "5", r=4, rank_pattern={"5": 3})
    trained = {path: layer.hra_u["default"] for path in "035" if (layer := model.get_submodule(path))}
    start = {path: own.detach().clone() for path, own in trained.items()}
    held = {path: nn.Parameter(own.clone()) for path, own in start.items()}

    def dense(x: Tensor) -> Tensor:
        weights = {f"{path}.weight": plain.get_submodule(path).weight for path in held}
        turned = {key: dense_weight(weight, dense_q(held[key[0]])).to(dtype) for key, weight in weights.items()}  # type: ignore[arg-type]
        return functional_call(plain, turned, x)  # type: ignore[no-any-return]

    train(model, make([one for one in model.parameters() if one.requires_grad]), dtype, clipped)
    train(dense, make(held.values()), dtype, clipped)
    for path, wanted in held.items():
        assert relative_error(trained[path], wanted) < (1e-9 if dtype is F64 else 1e-4), path
        assert relative_error(trained[path], start[path]) > 1e-2, path
