"""A method that remembers what it could compute anew, as the attention biases of timm's levit."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from capture.checks import adapt, assert_equals_oracle, assert_refused, assert_whole, inputs, spied
from capture.models import Two
from torch import Tensor, nn

X = inputs(4, 6)


class Remembers(Two):
    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("places", torch.tensor([0, 1, 2, 1, 0, 2, 2, 1]))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def remembered(self, device: torch.device) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.biases[:, self.places]
        else:
            key = str(device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.places]
            return self.cache[key]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.remembered(x.device)[0])


def test_what_is_remembered_is_computed_anew_in_the_graph() -> None:
    adapted, base = adapt(Remembers())
    assert_whole(adapted)
    spy = spied(adapted, X)
    assert_equals_oracle(adapted, base, X)
    assert spy.runs == 3 and adapted.cache == {}
    assert not torch.jit.is_tracing()  # type: ignore[attr-defined]


def test_what_is_remembered_already_refuses_the_region() -> None:
    model = Remembers().double().eval()
    with torch.no_grad():
        model(X)
    assert model.cache
    adapted, base = adapt(model)
    assert_refused(adapted, "it takes a value for text")
    assert_equals_oracle(adapted, base, X, modes=(False, True, False))


class Another(Remembers):
    """Another value than the one that it remembers."""

    def remembered(self, device: torch.device) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.biases[:, self.places]
        else:
            key = str(device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.places] * 2
            return self.cache[key]


class OfInput(Remembers):
    """What it remembers depends on the input that was first."""

    def remembered(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.biases[:, self.places] + x[:2, :1]
        else:
            key = str(x.device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.places] + x[:2, :1]
            return self.cache[key]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + self.remembered(x)[0])


class Counts(Remembers):
    def remembered(self, device: torch.device) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.biases[:, self.places]
        else:
            key = str(device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.places]
                self.count = 1
            return self.cache[key]


@pytest.mark.parametrize("model", [Another, OfInput, Counts])
def test_a_memory_that_makes_a_difference_refuses_the_region(model: type[nn.Module]) -> None:
    adapted, base = adapt(model())
    assert_refused(adapted, "it takes a value for text")
    for value in (1, 2):
        assert_equals_oracle(adapted, base, inputs(4, 6, value=value), modes=(False, False, True))


class Exports(Remembers):
    """Something else when it is traced, which no graph may be made of."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if torch.jit.is_tracing() else hidden * 2 + self.remembered(x.device)[0])


def test_no_other_method_is_told_that_it_is_traced() -> None:
    adapted, base = adapt(Exports())
    assert_whole(adapted)
    assert_equals_oracle(adapted, base, X)


@pytest.mark.parametrize("name", ["levit_128s", "efficientformerv2_s0"])
def test_models_of_timm_that_remember_their_biases_are_whole(name: str) -> None:
    sizes = (
        {"embed_dim": (16, 24, 32), "num_heads": (1, 2, 2), "depth": (1, 1, 1), "key_dim": 8} if "levit" in name else {}
    )
    model = timm.create_model(name, num_classes=5, **sizes)
    linears = [path for path, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    adapted, _ = adapt(model, linears, r=2)
    assert_whole(adapted)
