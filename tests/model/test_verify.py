"""`transform(..., verify=True)`: correct models pass, wrong adapters are named, and the model is not changed."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from integrations.transformers_use import tiny
from model.many import adapted, assert_close, oracle
from model.verified import IMAGES, Cnn, Two, X, fresh, refused, targets, verified
from refusals import picture
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

import hra_fx
import hra_fx.model.inject
from hra_fx.errors import AdapterError, HRAWarning
from hra_fx.layers.variants import LinearReflection

IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def t5() -> Any:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))


GOOD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "anchored": (Two, X.float(), {"r": 3, "apply_GS": True}),
    "no training": (Two, X.float(), {"inference_mode": True}),
    "cnn with a trained head": (Cnn, IMAGES.float(), {"target_modules": ["first"], "modules_to_save": ["second"]}),
    "biases": (Cnn, IMAGES.float(), {"bias": "all"}),
    "bert with labels": (tiny.bert, TOKENS | {"labels": torch.tensor([0, 1])}, {"target_modules": "all-linear"}),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), TOKENS, {"target_modules": ["q_proj", "lm_head"]}),
    "t5": (t5, {"input_ids": IDS, "labels": IDS}, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
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


def test_a_verified_model_equals_the_oracle() -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["first", "second"])
    plain, model = adapted(fresh(Two()), default=config)
    hra_fx.transform(model, config, example_inputs=X, verify=True)
    assert_close(model(X), oracle(plain, model, ["default"], X))


def test_example_inputs_are_required() -> None:
    model = Two()
    before = picture(model)
    with pytest.raises(AdapterError, match=r"^verify=True: .*Give example_inputs"):
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["first"]), verify=True)
    assert picture(model) == before


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


class Shared(Two):
    def __init__(self) -> None:
        super().__init__()
        self.second = self.first


@dataclasses.dataclass
class Output:
    value: Tensor
    note: str = ""


class Structured(Two):
    def forward(self, x: Tensor) -> Any:
        return {"out": [Output(super().forward(x))], "label": "text", "count": 3}


@pytest.mark.parametrize("make", [Draws, Rotary, InPlace, Rounded, Shared, Structured])
def test_unusual_forwards_pass(make: Any) -> None:
    torch.manual_seed(0)
    model, example = make(), X.float()
    given = example.clone()
    verified(model, example)
    assert torch.equal(example, given)
    assert not getattr(model, "mean", torch.zeros(1)).any()


def test_warnings_of_the_fold_are_not_shown() -> None:
    model = tiny.llama(tie_word_embeddings=True)
    verified(model, TOKENS, target_modules=["lm_head"])
    assert model.config.tie_word_embeddings and model.lm_head.hra_base is model.model.embed_tokens.weight
    with pytest.warns(HRAWarning, match="untied: lm_head"):
        hra_fx.fold(model)


# Refusals


class Scaled(LinearReflection):
    """Not quite a reflection."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.01


class Detached(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


class HalfTheGradient(LinearReflection):
    """Correct in value."""

    def forward(self, input: Tensor) -> Tensor:
        right = super().forward(input)
        return (right + right.detach()) / 2


class WrongInTrainMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.01 if self.training else 1.0)


class WrongInEvalMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if self.training else 1.01)


class Crashing(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        raise ZeroDivisionError("by design")


def wrong(monkeypatch: pytest.MonkeyPatch, kind: type[LinearReflection], only: str = "") -> None:
    """Let `transform` use another reflection in layers whose `tag` contains `only`."""

    def make(layer: nn.Module, **options: Any) -> Any:
        reflection = ours(layer, **options)
        if only in getattr(layer, "tag", ""):
            reflection.__class__ = kind
        return reflection

    ours = hra_fx.model.inject.reflection_for
    monkeypatch.setattr(hra_fx.model.inject, "reflection_for", make)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.right(self.left(x)))


@pytest.mark.parametrize("layer", ["left.2", "right.0", "head"])
def test_the_first_module_whose_output_differs_is_named(monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    model = fresh(Blocks())
    model.get_submodule(layer).tag = "this"
    wrong(monkeypatch, Scaled, "this")
    assert refused(model, X) == (
        f"{layer}: in train mode its output with adapters differs from that with folded weights. The model is "
        "unchanged. Leave the layers out with exclude_modules, and please report the model."
    )
    monkeypatch.undo()
    verified(model, X)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Detached, "left.0: in train mode the gradient of its vectors 'default' is missing. "),
        (HalfTheGradient, "left.0: in train mode the gradient of its vectors 'default' is wrong. "),
        (Crashing, "the model: in train mode it runs with folded weights, but not with adapters (ZeroDivision"),
    ],
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_wrong_gradients_and_errors_are_reported(
    monkeypatch: pytest.MonkeyPatch, kind: Any, text: str, context: Any
) -> None:
    """Those of the layers before a wrong one are wrong too, so the first one is named."""
    model = fresh(Blocks())
    model.left[2].tag = "this"
    wrong(monkeypatch, kind, "this")
    with context():
        assert refused(model, X).startswith(text)


@pytest.mark.parametrize(("kind", "mode"), [(WrongInTrainMode, "train"), (WrongInEvalMode, "eval")])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_compared(monkeypatch: pytest.MonkeyPatch, kind: Any, mode: str, training: bool) -> None:
    wrong(monkeypatch, kind)
    assert f"in {mode} mode its output with adapters differs" in refused(fresh(Two()).train(training), X)


@pytest.mark.parametrize("make", [Rounded, Structured])
def test_float32_and_structured_outputs_are_compared(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    torch.manual_seed(0)
    wrong(monkeypatch, Scaled)
    assert "in train mode its output with adapters differs" in refused(make(), X.float())


class NoTensor(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(-1)


def test_unsuitable_example_inputs_are_refused() -> None:
    assert refused(fresh(NoTensor()), X) == (
        "example_inputs: in train mode NoTensor returns no floating-point tensor for them, so there is nothing to "
        "compare. Give other inputs, or leave verify out."
    )
    model = Cnn()
    model.features.append(nn.AdaptiveAvgPool2d(1)).append(nn.BatchNorm2d(8))
    message = refused(model.eval(), IMAGES[:1].float())
    assert message.startswith("example_inputs: in train mode Cnn without adapters does not run on them (ValueE")
    assert message.endswith("Give inputs that the base model takes in both modes.")
    verified(model.eval(), IMAGES.float())
    assert not model.training and not model.features[2].training
