"""Outputs in both modes, at every size, against the base model over rotated weights; and what capture gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from integrations.models.zoo import EVERY, RESNET, VISION, Case, adapted, assert_same, run_oracle, tensors
from torch import nn

import hra_fx
from hra_fx.model.state import regions_of

every = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


@contextmanager
def graphs_in_use(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Region path -> whether its graph stood for each call, and not the Python forward that it falls back to."""
    used: dict[str, bool] = {}
    hooks = []
    for path, module in regions_of(model).items():

        def look(module: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
            used[path] = used.get(path, True) and module._hra_region.program(module, args, kwargs) is not None

        hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    yield used
    for hook in hooks:
        hook.remove()


@every
def test_what_capture_gives(case: Case) -> None:
    rows = hra_fx.report(adapted(case)[1]).rows
    assert {row.r for row in rows} == {3}


@every
def test_start_is_the_base_model(case: Case) -> None:
    base = case.base()
    inputs = case.inputs(2, case.sizes[0])
    with torch.no_grad():
        before = base(**inputs)
        assert_same(hra_fx.transform(base, case.config())(**inputs), before)


@every
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [0, 1])
def test_eval(case: Case, batch: int, size: int) -> None:
    base, model = adapted(case)
    inputs = case.inputs(batch, case.sizes[size])
    # Keywords run the Python forward of a vision model, positions its graph.
    args, kwargs = (tuple(inputs.values()), {}) if case in VISION else ((), inputs)
    with torch.no_grad(), graphs_in_use(model) as used:
        output = model(*args, **kwargs)
    assert used == dict.fromkeys(case.regions, True)
    with torch.no_grad():
        assert_same(output, run_oracle(base, model, inputs))
        assert_same(model(**inputs), output)
        moved = [a - b for a, b in zip(tensors(output), tensors(base(**inputs)), strict=True)]
    assert max(float(change.abs().max()) for change in moved) > 1e-3


@every
@pytest.mark.parametrize("batch", [2, 3])
def test_train_draws_what_the_base_draws(case: Case, batch: int) -> None:
    base, model = adapted(case)
    base.train()
    model.train()
    inputs = case.inputs(batch, case.sizes[0])
    outputs = []
    with torch.no_grad():
        for value in (1, 1, 2):
            seed(value)
            outputs.append(model(**inputs))
            seed(value)
            assert_same(outputs[-1], run_oracle(base, model, inputs))
    buffers = dict(model.named_buffers())
    for name, buffer in base.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-9, atol=1e-12, msg=name)


def test_batch_norm_counts_each_train_step_once_and_no_eval_step() -> None:
    _, model = adapted(RESNET)
    inputs = RESNET.inputs(2, 32)["x"]
    model(inputs)
    assert int(model.bn1.num_batches_tracked) == 0
    model.train()
    model(inputs)
    model(inputs)
    assert int(model.bn1.num_batches_tracked) == 2
    assert int(model.layer4[1].bn2.num_batches_tracked) == 2


@every
def test_modes_can_change_back_and_forth(case: Case) -> None:
    base, model = adapted(case)
    inputs = case.inputs(2, case.sizes[0])
    with torch.no_grad():
        for mode in (False, True, False, True):
            base.train(mode)
            model.train(mode)
            seed(3)
            output = model(**inputs)
            seed(3)
            assert_same(output, run_oracle(base, model, inputs))
