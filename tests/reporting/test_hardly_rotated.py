"""The footnote of a report on an adapter that hardly rotates: after too small a learning rate, and only then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reporting.made import report_of, row
from torch import nn

from hra_fx import HRAConfig, report, transform

HEADING = "Hardly rotated:"


def line_of(degrees: str) -> str:
    return (
        f"the largest angle of all layers is {degrees} degrees. If this adapter is trained, try a larger learning "
        "rate: HRA's vectors start with entries of about 0.3, and rates from 3e-3 to 1e-2 are usual for AdamW "
        "(docs/training.md)"
    )


def turned(*degrees: float) -> Any:
    return report_of(*(row(f"layer{index}", angle=math.radians(angle)) for index, angle in enumerate(degrees)))


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 10))
    return transform(layers, HRAConfig(target_modules=["0", "2"], **({"r": 8} | fields)))


def trained(rate: float) -> Any:
    model = adapted()
    inputs = torch.randn(256, 48)
    wanted = inputs[:, :10].argmax(dim=1)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    for start in range(0, 256, 8):
        loss = nn.functional.cross_entropy(model(inputs[start : start + 8]), wanted[start : start + 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_every_format_has_the_footnote() -> None:
    found = turned(0.2, 2.1, 0.0)
    assert f"\n{HEADING}\n  {line_of('2.1')}\n" in str(found)
    assert f"\n{HEADING}\n\n- {line_of('2.1')}\n" in found.to_markdown()


@pytest.mark.parametrize("degrees", [(0.6,), (9.9,), (0.0, 5.0), (0.1, 0.7)])
def test_small_angles_of_all_layers_are_remarked(degrees: tuple[float, ...]) -> None:
    assert line_of(f"{max(degrees):.1f}") in str(turned(*degrees))


@pytest.mark.parametrize("degrees", [(), (0.0,), (0.0, 0.4), (2.0, 10.1), (180.0,), (2.0, math.nan), (math.nan, 2.0)])
def test_other_angles_are_not_remarked(degrees: tuple[float, ...]) -> None:
    """No rows, the identity, rounding, one layer that is rotated, a reflection, an angle that is not known."""
    assert HEADING not in str(turned(*degrees))


def test_a_learning_rate_of_lora_is_remarked_and_a_usual_one_is_not() -> None:
    low, usual = report(trained(1e-4)), report(trained(1e-2))
    assert HEADING in str(low)
    assert HEADING not in str(usual)
    # Far from both bounds: 0.5 and 10 degrees.
    assert 1 < math.degrees(max(one.angle for one in low)) < 5
    assert math.degrees(min(one.angle for one in usual)) > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"apply_GS": True}, {"apply_GS": True, "r": 16}], ids=str)
def test_a_fresh_adapter_is_not_remarked(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """Also if it is cast, which moves the basis of Gram-Schmidt by the rounding error."""
    model = adapted(**fields)
    assert HEADING not in str(report(model.to(dtype)))
    assert HEADING not in str(report(adapted(init_weights=False, **fields).to(dtype))), "reflections"
