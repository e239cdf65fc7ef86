"""`example_inputs`: one call of a copy shows how inner modules are called, and the model is as it was."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import (
    assert_close,
    assert_equals_oracle,
    base_buffers,
    fresh,
    inputs,
    oracle,
    reasons,
    seed,
    spied,
    turn,
)
from refusals import picture
from torch import Tensor, nn
from transformers import BatchEncoding

import hra_fx
from hra_fx.errors import AdapterError, HRAError

X, MASK = inputs(4, 6), inputs(4, 6, value=8).sigmoid()
CONFIG = hra_fx.HRAConfig(r=2, target_modules=["up", "down"])


class Attend(nn.Module):
    """A block 6 -> 6 with optional arguments, as blocks of transformers and diffusers have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, cache: Any = None, shape: Any = None
    ) -> Tensor:
        hidden = self.up(self.norm(x))
        hidden = nn.functional.dropout(torch.tanh(hidden), 0.3, self.training) * scale
        result = self.down(hidden)
        if mask is not None:
            result = result * mask
        if cache is not None:
            cache.append(result)
        return x + result


class Untraceable(nn.Module):
    """Branches on a value, so that its blocks are regions or nothing; `ways` says how each is called."""

    def __init__(self, *ways: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attend() for _ in ways)
        self.ways = ways

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        for block, way in zip(self.blocks, self.ways, strict=True):
            x = way(block, x, mask)
        return x


def alone(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x)


def masked(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x, mask)


def scaled(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x, mask=mask, scale=0.5)


def scaled_by_keyword(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(scale=0.5, x=x)


def shaped(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x, shape=(4, 6))


def twice(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(block(x), mask)


def twice_alike(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x=block(x, scale=0.5), scale=0.5)


def cached(block: Any, x: Tensor, mask: Any) -> Tensor:
    return block(x, cache=Cache())


class Cache(list[Tensor]):
    pass


def observed(model: nn.Module, example: Any, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """A model that was transformed with an example, with random vectors, and a copy of what it was."""
    fresh(model)
    base = copy.deepcopy(model).requires_grad_(False)
    targets = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    config = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets} | fields))
    hra_fx.transform(model, config, example_inputs=example)
    turn(model)
    return model, base


def regions(model: nn.Module) -> list[str]:
    return [row.region for row in hra_fx.report(model).rows]


@pytest.mark.parametrize("way", [masked, scaled, scaled_by_keyword, shaped, twice_alike])
def test_an_observed_call_makes_a_block_with_optional_arguments_a_region(way: Callable[..., Tensor]) -> None:
    adapted, base = observed(Untraceable(way, way), (X, MASK))
    assert regions(adapted) == ["shared"] * 4
    spy = spied(adapted, X, MASK)
    assert_equals_oracle(adapted, base, X, MASK)
    assert spy.runs == 3 * 2 * (2 if way is twice_alike else 1)


def test_without_an_example_they_are_alone() -> None:
    model = fresh(Untraceable(masked))
    hra_fx.transform(model, CONFIG)
    assert regions(model) == ["alone"] * 2
    assert "forward has optional arguments (mask, scale, cache, shape), and no call is known" in reasons(model)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (twice, "blocks.0 (Attend): it is called in several ways"),
        (cached, "blocks.0 (Attend): it is called with cache, a Cache, which may change from call to call"),
    ],
)
def test_no_one_way_and_objects_are_refused_with_that_reason(way: Callable[..., Tensor], reason: str) -> None:
    adapted, base = observed(Untraceable(way), (X, MASK))
    assert regions(adapted) == ["alone"] * 2 and reason in reasons(adapted)
    assert_equals_oracle(adapted, base, X, MASK)
    assert_equals_oracle(adapted, base, X)


def test_a_later_call_in_another_way_runs_the_python_forward() -> None:
    adapted, base = observed(Untraceable(masked, alone), (X, MASK))
    spy = spied(adapted, X, MASK)
    assert_equals_oracle(adapted, base, X, mask=MASK)
    assert spy.runs == 6
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 9, "only the block that is called as ever"
    assert_equals_oracle(adapted, base, inputs(2, 6), inputs(2, 6, value=5))
    assert spy.runs == 15
    for part in (adapted, base):
        part.ways = (scaled, cached)
    assert_equals_oracle(adapted, base, X, MASK)
    assert spy.runs == 15


def test_copies_and_pickles_know_the_way_too() -> None:
    adapted, base = observed(Untraceable(masked, scaled), (X, MASK))
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        spy = spied(twin, X, MASK)
        assert_equals_oracle(twin, base, X, MASK)
        assert spy.runs == 6


class Whole(nn.Module):
    """The model itself has optional arguments, which the example gives."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Attend()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        out = self.head(self.block(x, mask))
        return out * 2 if double else out


def test_the_model_itself_is_captured_as_it_is_called() -> None:
    adapted, base = observed(Whole(), {"x": X, "mask": MASK, "double": True})
    assert regions(adapted) == ["whole"] * 3
    spy = spied(adapted, X, MASK, double=True)
    assert_equals_oracle(adapted, base, X, MASK, True)
    assert spy.runs == 3
    for args in ((X,), (X, MASK), (X, MASK, 1)):
        assert_equals_oracle(adapted, base, *args)
    assert spy.runs == 3


class Collects(Untraceable):
    """The block writes into the list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Append()])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        outs: list[Tensor] = []
        named: dict[str, Tensor] = {}
        return (self.blocks[0](x, outs, named), outs, named) if float(x.detach().sum()) < 1e9 else x


class Append(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor, outs: list[Tensor], named: dict[str, Tensor]) -> Tensor:
        outs.append(self.up(x))
        named["down"] = self.down(torch.tanh(outs[-1]))
        return named["down"]


def test_a_list_or_dictionary_that_the_forward_fills_is_filled() -> None:
    adapted, base = observed(Collects(), X)
    assert_equals_oracle(adapted, base, X)


class Everything(nn.Module):
    """Draws numbers of three kinds, updates buffers, has hooks, gradients, frozen parts and parts in other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = Attend()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        noise = random.random() + np.random.rand() + torch.rand(())
        hidden = torch.relu(self.norm(self.conv(x * noise)))
        return self.block(hidden.mean(dim=3), scale=0.5) if float(hidden.detach().sum()) < 1e9 else hidden


def drawn() -> list[Any]:
    return [
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    ]


def test_nothing_of_the_model_and_nothing_outside_of_it_is_touched() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["up", "down", "conv"], init_weights=False)
    model = fresh(Everything()).train()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    heard: list[str] = []
    handle = model.norm.register_forward_hook(lambda *_: heard.append("hook"))
    before = picture(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state, others = torch.get_rng_state(), drawn()
    images = inputs(2, 3, 6, 6)
    given = images.clone()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hra_fx.transform(model, config, example_inputs=images)
    assert drawn() == others
    assert torch.equal(images, given) and not images.requires_grad and images.grad is None
    assert all(torch.equal(value, buffers[name]) for name, value in base_buffers(model))
    assert model.seen == [] and list(model.norm._forward_hooks) == [handle.id]
    assert not model.norm.training and model.training and model.block.training
    assert all(not part._forward_pre_hooks for part in model.modules())
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    hra_fx.fold(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert picture(model)[0] == before[0]
    # The vectors are drawn from the state that there was, and from nothing else.
    twin = fresh(Everything()).train()
    torch.set_rng_state(state)
    hra_fx.transform(twin, config)
    vectors = {name: value.clone() for name, value in twin.named_parameters() if "hra_u" in name}
    other = fresh(Everything()).train()
    torch.set_rng_state(state)
    hra_fx.transform(other, config, example_inputs=images)
    assert vectors and all(torch.equal(value, other.get_parameter(name)) for name, value in vectors.items())


def gone_wrong(x: Tensor) -> Iterator[tuple[Any, str]]:
    yield 3, "example_inputs: a int. Give a tensor, a tuple of positional arguments, or a dictionary of keyword"
    yield "text", "example_inputs: a str. Give a tensor"
    yield {x}, "example_inputs: a set. Give a tensor"
    yield x[:, :5], "example_inputs: Untraceable does not run on them (RuntimeError: Given normalized_shape=[6]"
    yield (x, x, x), "example_inputs: Untraceable does not run on them (TypeError: "
    yield {"y": x}, "example_inputs: Untraceable does not run on them (TypeError: "
    yield (), "example_inputs: Untraceable does not run on them (TypeError: "


@pytest.mark.parametrize(("example", "message"), list(gone_wrong(X)), ids=str)
def test_examples_that_are_none_or_do_not_run(example: Any, message: str) -> None:
    model = fresh(Untraceable(masked))
    before, state = picture(model), torch.get_rng_state()
    with pytest.raises(AdapterError) as caught:
        hra_fx.transform(model, CONFIG, example_inputs=example)
    assert str(caught.value).startswith(message)
    assert picture(model) == before and torch.equal(torch.get_rng_state(), state)
    assert isinstance(caught.value, HRAError)


def test_a_model_that_cannot_be_copied() -> None:
    model = fresh(Untraceable(masked))
    model.last = X.clone().requires_grad_() * 2
    with pytest.raises(AdapterError, match="example_inputs: Untraceable cannot be copied") as caught:
        hra_fx.transform(model, CONFIG, example_inputs=X)
    assert "Leave example_inputs out" in str(caught.value)


@pytest.mark.parametrize(
    "example",
    [X, (X,), [X], (X, MASK), {"x": X, "mask": MASK}, BatchEncoding({"x": X}), {"x": X, "mask": None}],
    ids=["tensor", "tuple", "list", "two", "dict", "BatchEncoding", "None"],
)
def test_examples_of_every_shape(example: Any) -> None:
    adapted, base = observed(Untraceable(masked, scaled), example)
    assert_equals_oracle(adapted, base, X, MASK)
    assert_equals_oracle(adapted, base, X)


def test_a_shared_block_that_is_called_by_two_paths() -> None:
    model = Untraceable(masked, scaled)
    model.blocks[1] = model.blocks[0]
    adapted, base = observed(model, (X, MASK))
    assert "it is called in several ways" in reasons(adapted)
    assert_equals_plain(adapted, base)
    alike = Untraceable(masked, masked)
    alike.blocks[1] = alike.blocks[0]
    adapted, base = observed(alike, (X, MASK))
    assert regions(adapted) == ["shared"] * 2, reasons(adapted)
    spy = spied(adapted, X, MASK)
    assert_equals_plain(adapted, base)
    assert spy.runs == 4


def assert_equals_plain(adapted: nn.Module, base: nn.Module) -> None:
    """Against a model with the oracle's weights, for functional_call changes a module that has two paths."""
    plain = oracle(adapted, base)
    for mode in (True, False):
        seed()
        found = adapted.train(mode)(X, MASK)
        seed()
        assert_close(found.detach(), plain.train(mode)(X, MASK).detach())


def test_an_example_in_inference_mode_and_without_gradients() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        model = fresh(Untraceable(masked))
        base = copy.deepcopy(model).requires_grad_(False)
        with mode():
            x = X.clone()
            hra_fx.transform(model, CONFIG, example_inputs=(x, MASK))
        turn(model)
        assert regions(model) == ["shared"] * 2
        assert_equals_oracle(model, base, X, MASK)


def test_more_adapters_after_an_example() -> None:
    adapted, base = observed(Untraceable(masked), (X, MASK), target_modules=["up"])
    assert regions(adapted) == ["alone"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hra_fx.add_adapter(adapted, "other", hra_fx.HRAConfig(r=2, target_modules=["down"]))
    assert_equals_oracle(adapted, base, X, MASK)
