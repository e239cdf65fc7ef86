"""`transform(..., verify=True)`: right models pass, wrong rewrites are named, and the model is as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import assert_equals_oracle, fresh, turn
from integrations.transformers_use import tiny
from refusals import picture
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration
from verified import IMAGES, Cnn, Two, X, refused, targets, verified

import hra_fx
import hra_fx.api.transform
from hra_fx.errors import AdapterError, HRAWarning

IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))


def t5() -> Any:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))


TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


GOOD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "two": (Two, X.float(), {}),
    "anchored": (Two, X.float(), {"r": 3, "apply_GS": True}),
    "no training": (Two, X.float(), {"inference_mode": True}),
    "cnn": (Cnn, IMAGES.float(), {}),
    "cnn with a trained head": (Cnn, IMAGES.float(), {"target_modules": ["first"], "modules_to_save": ["second"]}),
    "biases": (Cnn, IMAGES.float(), {"bias": "all"}),
    "bert": (tiny.bert, TOKENS, {"target_modules": "all-linear"}),
    "bert with labels": (tiny.bert, TOKENS | {"labels": torch.tensor([0, 1])}, {"target_modules": ["query", "value"]}),
    "llama": (lambda: tiny.llama(num_hidden_layers=4), TOKENS, {"target_modules": "all-linear"}),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), TOKENS, {"target_modules": ["q_proj", "lm_head"]}),
    "t5": (t5, {"input_ids": IDS, "labels": IDS}, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    "mixtral": (mixtral, TOKENS, {"target_modules": ["q_proj", "o_proj", "lm_head"]}),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_models_pass_and_are_not_changed(name: str, dtype: torch.dtype) -> None:
    make, example, fields = GOOD[name]
    torch.manual_seed(1)
    model = make().to(dtype)
    if isinstance(example, Tensor):
        example = example.to(dtype)
    twin = copy.deepcopy(model)
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    verified(model, example, **fields)
    torch.manual_seed(0)
    plain = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(twin)} | fields))
    hra_fx.transform(twin, plain)
    expected = {name: value for name, value in twin.state_dict().items() if ".hra_u." in name}
    found = model.state_dict()
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    assert [part.training for part in model.modules() if "hra_fx" not in type(part).__module__][:3] == modes[:3]
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in expected} == {
        n: p.requires_grad for n, p in twin.named_parameters() if n in expected
    }
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == state[1] and (np.random.get_state()[1] == state[2]).all()
    assert all(p.dtype == dtype for n, p in model.named_parameters() if ".hra_u." not in n)


def test_a_verified_model_equals_the_oracle() -> None:
    model = fresh(Two())
    base = copy.deepcopy(model).requires_grad_(False)
    verified(model, X)
    turn(model)
    assert_equals_oracle(model, base, X)


def test_without_an_example_there_is_nothing_to_run() -> None:
    model = Two()
    before = picture(model)
    with pytest.raises(AdapterError) as caught:
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["first"]), verify=True)
    assert str(caught.value) == (
        "verify=True: there is nothing to run. Give example_inputs, the arguments of one call."
    )
    assert picture(model) == before


class Draws(Two):
    """Draws numbers of Python, numpy and torch."""

    def forward(self, x: Tensor) -> Any:
        x = x * (1 + random.random()) + np.random.rand() + torch.rand_like(x)
        skipped = random.random() < 0.5
        return x + (0 if skipped else super().forward(nn.functional.dropout(x, 0.5)))


def test_random_numbers_of_the_forward_are_the_same_for_both() -> None:
    for _ in range(5):
        verified(fresh(Draws()), X)


class Rotary(Two):
    """A complex buffer, as frequencies of rotations are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Any:
        turned = torch.view_as_complex(x.view(*x.shape[:-1], 3, 2)) * self.frequencies
        return super().forward(torch.view_as_real(turned).flatten(-2).to(x.dtype))


def test_a_complex_buffer() -> None:
    verified(Rotary(), X.float())


class InPlace(Two):
    """Writes into what it is given, and into its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        x.mul_(0.5)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean), 0.1)
        return super().forward(x) + self.mean


def test_a_forward_that_writes_its_input_and_a_buffer() -> None:
    model, example = InPlace(), X.float()
    given = example.clone()
    verified(model, example)
    assert torch.equal(example, given) and not model.mean.any()


def test_an_example_that_only_one_mode_takes() -> None:
    model = Cnn()
    model.features.append(nn.AdaptiveAvgPool2d(1)).append(nn.BatchNorm2d(8))
    message = refused(model.eval(), IMAGES[:1].float())
    assert message.startswith("example_inputs: in train mode Cnn without its reflections does not run on them (ValueE")
    assert message.endswith("Give inputs that the base model takes in both modes.")
    verified(model.eval(), IMAGES.float())
    assert not model.training and not model.features[2].training


def test_frozen_models_pass_and_stay_frozen() -> None:
    model = fresh(Two()).requires_grad_(False)
    verified(model, X)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "first.hra_u.default",
        "second.hra_u.default",
    ]


def test_shared_layers() -> None:
    class Shared(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.first

    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = self.first.weight

    verified(fresh(Shared()), X)
    verified(fresh(Tied()), X, target_modules=["first"])


def test_a_warning_of_the_fold_is_not_shown() -> None:
    """The fold of the copy unties, which is no concern of the user's yet."""
    model = tiny.llama(tie_word_embeddings=True)
    verified(model, TOKENS, target_modules=["lm_head"])
    assert model.config.tie_word_embeddings and model.lm_head.hra_base is model.model.embed_tokens.weight
    with pytest.warns(HRAWarning, match="untied: lm_head"):
        hra_fx.fold(model)
