"""Outputs in both modes, for several batch and input sizes, against the base model with the weights `W Q`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from integrations.models.zoo import EVERY, VISION, Case, adapted, assert_same, run_oracle, tensors

import hra_fx

every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


@every
def test_start_is_the_base_model(case: Case) -> None:
    base = case.base()
    inputs = case.inputs(2, case.sizes[0])
    with torch.no_grad():
        before = base(**inputs)
        model = hra_fx.transform(base, case.config())
        assert_same(model(**inputs), before)
    assert {row.r for row in hra_fx.report(model)} == {3}


@every
@pytest.mark.parametrize(("batch", "size"), [(1, 0), (3, 1)])
def test_eval(case: Case, batch: int, size: int) -> None:
    base, model = adapted(case)
    inputs = case.inputs(batch, case.sizes[size])
    args, kwargs = (tuple(inputs.values()), {}) if case in VISION else ((), inputs)
    with torch.no_grad():
        output = model(*args, **kwargs)
        assert_same(output, run_oracle(base, model, inputs))
        assert_same(model(**inputs), output)
        moved = [a - b for a, b in zip(tensors(output), tensors(base(**inputs)), strict=True)]
    assert max(float(change.abs().max()) for change in moved) > 1e-3


@every
def test_train_and_eval_mode_alternate(case: Case) -> None:
    """Dropout, stochastic depth and BatchNorm do what they do in the base model."""
    base, model = adapted(case)
    for step, mode in enumerate((True, False, True)):
        base.train(mode)
        model.train(mode)
        inputs = case.inputs(2 + step, case.sizes[0])
        with torch.no_grad():
            seed(step)
            output = model(**inputs)
            seed(step)
            assert_same(output, run_oracle(base, model, inputs))
    buffers = dict(model.named_buffers())
    for name, buffer in base.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-12, msg=name)
