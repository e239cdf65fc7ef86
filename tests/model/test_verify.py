"""`transform(..., verify=True)`: correct models pass, wrong adapters are named, and the model is not changed."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from adapting import picture
from model.many import normal
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import hra_fx
import hra_fx.model.inject
from hra_fx.errors import AdapterError, VerificationError

X = normal(4, 6)
IMAGES = normal(3, 3, 8, 8)


def fresh(model: nn.Module) -> nn.Module:
    """The model in float64, with the same parameters in each test."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
    return model


class Two(nn.Module):
    """Two layers 6 -> 6 and a branch on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x))) if float(x.detach().sum()) < 1e9 else x


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 6, 3, padding=1, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"),
        nn.Dropout2d(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def targets(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def verified(model: nn.Module, example: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(model)} | fields))
    return hra_fx.transform(model, config, example_inputs=example, verify=True)


def refused(model: nn.Module, example: Any, kind: Any = VerificationError, **fields: Any) -> str:
    before, state = picture(model), torch.get_rng_state()
    with pytest.raises(kind) as caught:
        verified(model, example, **fields)
    assert picture(model) == before
    torch.set_rng_state(state)
    return str(caught.value)


IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def mixtral() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))


GOOD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "anchored": (Two, X.float(), {"r": 3, "apply_GS": True}),
    "cnn with a trained head": (cnn, IMAGES.float(), {"target_modules": ["1", "4"], "modules_to_save": ["8"]}),
    "bert with labels": (tiny.bert, TOKENS | {"labels": torch.tensor([0, 1])}, {"target_modules": "all-linear"}),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), TOKENS, {"target_modules": ["q_proj", "lm_head"]}),
    "mixtral": (mixtral, TOKENS, {"target_modules": ["q_proj", "o_proj", "lm_head"]}),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_correct_models_pass_and_are_not_changed(name: str, dtype: torch.dtype) -> None:
    make, example, fields = GOOD[name]
    torch.manual_seed(1)
    model = make().to(dtype)
    if isinstance(example, Tensor):
        example = example.to(dtype)
    twin = copy.deepcopy(model)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    verified(model, example, **fields)
    torch.manual_seed(0)
    hra_fx.transform(twin, hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(twin)} | fields)))
    found, expected = model.state_dict(), twin.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    flags = [[(n, p.requires_grad, p.grad is None) for n, p in each.named_parameters()] for each in (model, twin)]
    assert flags[0] == flags[1]
    assert random.getstate() == state[1] and (np.random.get_state()[1] == state[2]).all()


class Draws(Two):
    """Draws from the random number generators of Python, numpy and torch."""

    def forward(self, x: Tensor) -> Any:
        x = x * (1 + random.random()) + np.random.rand() + torch.rand_like(x)
        skipped = random.random() < 0.5
        return x + (0 if skipped else super().forward(nn.functional.dropout(x, 0.5)))


class Rotary(Two):
    """Has a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Any:
        turned = torch.view_as_complex(x.view(*x.shape[:-1], 3, 2)) * self.frequencies
        return super().forward(torch.view_as_real(turned).flatten(-2).to(x.dtype))


class InPlace(Two):
    """Writes into its input and its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        x.mul_(0.5)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean), 0.1)
        return super().forward(x) + self.mean


class Rounded(Two):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        if x.dtype is torch.float64:
            raise TypeError("no doubles")
        return super().forward(x)


@dataclasses.dataclass
class Output:
    value: Tensor
    note: str = ""


class Structured(Two):
    def forward(self, x: Tensor) -> Any:
        return {"out": [Output(super().forward(x))], "label": "text", "count": 3}


@pytest.mark.parametrize("make", [Draws, Rotary, InPlace, Rounded, Structured])
def test_unusual_forwards_pass(make: Any) -> None:
    model, example = make(), X.float()
    given = example.clone()
    verified(model, example)
    assert torch.equal(example, given)
    assert not getattr(model, "mean", torch.zeros(1)).any()


# Refusals


def wrong(layer: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Change the output of a layer while it has adapters, so that it differs from that of its folded weight."""

    def hook(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(part, output) if hasattr(part, "hra_u") else output

    layer.register_forward_hook(hook)


def crash(part: nn.Module, output: Tensor) -> Tensor:
    raise ZeroDivisionError("by design")


def blocks() -> nn.Sequential:
    return fresh(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)))


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_the_first_module_whose_output_differs_is_named(layer: str) -> None:
    model = blocks()
    wrong(model.get_submodule(layer), lambda _, output: output * 1.01)
    assert refused(model, X) == (
        f"{layer}: in train mode, its outputs with adapters and with folded weights differ. The model is "
        "unchanged. Leave the layers out with exclude_modules, and please open an issue."
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda _, output: output.detach(),
            "0: in train mode, the gradient of its vectors 'default' is missing. ",
        ),
        (
            lambda _, output: (output + output.detach()) / 2,
            "0: in train mode, the gradient of its vectors 'default' is wrong. ",
        ),
        (crash, "the model: in train mode, it runs with folded weights, but not with adapters (ZeroDivision"),
    ],
    ids=["missing", "wrong", "crash"],
)
def test_wrong_gradients_and_errors_are_reported(change: Any, text: str) -> None:
    """The gradients of the layers before a wrong one are wrong too, so the first one is named."""
    model = blocks()
    wrong(model[2], change)
    with torch.inference_mode():
        assert refused(model, X).startswith(text)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_compared(mode: str, training: bool) -> None:
    model = fresh(Two()).train(training)
    wrong(model.first, lambda part, output: output * (1.01 if part.training is (mode == "train") else 1.0))
    assert f"in {mode} mode, its outputs with adapters and with folded weights differ" in refused(model, X)


@pytest.mark.parametrize("make", [Rounded, Structured])
def test_float32_and_structured_outputs_are_compared(make: Any) -> None:
    model = make()
    wrong(model.first, lambda _, output: output * 1.01)
    assert "in train mode, its outputs with adapters and with folded weights differ" in refused(model, X.float())


class NoTensor(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(-1)


def test_unsuitable_example_inputs_are_refused() -> None:
    assert refused(fresh(NoTensor()), X) == (
        "example_inputs: in train mode, NoTensor returns no floating-point tensor to compare. Pass other inputs, or "
        "leave verify out."
    )
    model = nn.Sequential(*cnn()[:7], nn.BatchNorm2d(8), nn.Flatten())
    message = refused(model.eval(), IMAGES[:1].float())
    assert message.startswith("example_inputs: in train mode, Sequential fails on them without adapters (ValueE")
    assert message.endswith("Pass inputs that work with the base model in both modes.")
    verified(model.eval(), IMAGES.float())
    assert not any(part.training for part in model.modules())
    assert refused(Two(), None, AdapterError).startswith("verify=True needs `example_inputs`")
