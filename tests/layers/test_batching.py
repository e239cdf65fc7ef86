"""Outputs and gradients with factors that are computed in batches, also in `generate` and in 16 bits."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.checking import pair, run_dense, vectors_of
from layers.reading_weights import assert_gradients
from one_layer import BF16, F32, F64, normal
from oracles import relative_error
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hra_fx

X = normal(1, 4, 12)


class Net(nn.Module):
    """Three layers, two of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def adapted(make: Callable[[], nn.Module] = Net, dtype: torch.dtype = F64, **fields: Any) -> tuple[nn.Module, Any]:
    """A base model, and a copy whose three layers are adapted, in train mode."""
    base, model = pair(make, ["one", "two", "three"], dtype, **fields)
    return base.train(), model.train()


def assert_right(base: nn.Module, model: Any, found: Tensor) -> None:
    """The output and the gradients of all vectors are those of the oracle."""
    assert_gradients(found, run_dense(base, model, X), list(vectors_of(model).values()))


def test_layers_that_the_loss_does_not_reach_get_no_gradient() -> None:
    """As without batches. An optimizer would change a parameter with a gradient of zero, because of its momentum."""
    _, model = adapted()
    model.two.register_forward_hook(lambda layer, args, output: output.detach())
    model(X).sum().backward()
    assert [path for path, vectors in vectors_of(model).items() if vectors.grad is not None] == ["three"]
    _, model = adapted()
    hidden: list[Tensor] = []
    model.one.register_forward_hook(lambda layer, args, output: hidden.append(output))
    model(X)
    hidden[0].sum().backward()
    assert [path for path, vectors in vectors_of(model).items() if vectors.grad is not None] == ["one"]


@pytest.mark.parametrize("away", ["no shape", "another dtype"])
def test_vectors_that_a_tool_provides_only_while_a_layer_runs(away: str) -> None:
    """As DeepSpeed and layerwise casts do; FSDP2 itself runs in `tests/integrations/distributed`."""
    base, model = adapted(apply_GS=True)
    vectors = model.two.hra_u["default"]
    values = normal(60, *vectors.shape)
    if away == "another dtype":
        values = values.bfloat16().double()

    def provide(*_: object) -> None:
        vectors.data = values.clone()

    def withdraw(*_: object) -> None:
        vectors.data = values[0, :0] if away == "no shape" else values.bfloat16()

    withdraw()
    model.two.register_forward_pre_hook(provide)
    model.two.register_forward_hook(withdraw)
    found = model(X)
    provide()
    # The layer computes in float32 with vectors in a narrower dtype.
    assert relative_error(found, run_dense(base, model, X)) < (1e-6 if away == "another dtype" else 1e-12)


def test_another_dtype_from_now_on() -> None:
    base, model = adapted(apply_GS=True, dtype=F32)
    for dtype, tolerance in ((F32, 1e-5), (F64, 1e-12), (BF16, 5e-2), (F32, 1e-5)):
        base.to(dtype), model.to(dtype)
        found = model(X.to(dtype))
        assert relative_error(found, run_dense(copy.deepcopy(base).double(), model, X)) < tolerance
        found.sum().backward()
        model.zero_grad()
        model.load_state_dict(model.state_dict())


def test_a_model_called_within_another_and_in_another_thread() -> None:
    (base, inner), (_, outer) = adapted(), adapted(r=2)
    results: list[Tensor] = []
    outer.two.register_forward_hook(lambda *_: results.append(inner(X)))
    found = outer(X)
    thread = threading.Thread(target=lambda: results.append(inner(X)))
    thread.start()
    thread.join()
    assert_right(base, outer, found)
    for result in results:
        assert_right(base, inner, result)


class Island(nn.Module):
    """Computes in float32 under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            output: Tensor = self.layer(x)
            return output


def test_a_layer_in_a_wider_dtype_than_its_batch() -> None:
    model = hra_fx.transform(Island(), hra_fx.HRAConfig(r=4, target_modules=["layer"], init_weights=False))
    with torch.autocast("cpu", dtype=BF16):
        found = model(X.float())
    assert relative_error(found, model(X.float())) < 1e-6


@pytest.mark.parametrize("grad", [False, True])
def test_vectors_that_change_in_a_forward_count_from_then_on(grad: bool) -> None:
    """As in test-time training, where a forward calls layers, makes a step of an optimizer, and calls layers again."""
    base, model = adapted()
    names = ("two", "three")

    def change(*_: object) -> None:
        with torch.no_grad():
            model.two.hra_u["default"].copy_(normal(61, *model.two.hra_u["default"].shape))
            model.three.load_state_dict({**model.three.state_dict(), "hra_u.default": normal(62, 7, 3)})

    handle = model.one.register_forward_hook(change)
    with torch.set_grad_enabled(grad):
        found = model(X)
    handle.remove()
    if grad:
        found.sum().backward()
    wanted = run_dense(base, model, X)
    assert relative_error(found, wanted) < 1e-12
    if grad:
        vectors = [vectors_of(model)[name] for name in names]
        gradients = torch.autograd.grad(wanted.sum(), vectors)
        assert all(relative_error(own.grad, right) < 1e-9 for own, right in zip(vectors, gradients, strict=True))


# ---- forwards with one cache are steps of a generation, and use the factors of the first one ----


class Generator(Net):
    """Calls itself several times, as language models do."""

    def forward(self, x: Tensor, past_key_values: object = None) -> Tensor:
        return super().forward(x)

    def generate(self, x: Tensor, between: Callable[[Any], object] = lambda model: None) -> list[Tensor]:
        found, cache = [], nn.Identity()  # any object
        for _ in range(3):
            found.append(self(x, past_key_values=cache))
            between(self)
        return found


def test_generate_passes_one_cache() -> None:
    """By a name that hra_fx/layers/batch.py knows; under another one, factors are computed for each token."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=8))
    found: list[Any] = []

    def look(_: object, args: object, kwargs: dict[str, Any]) -> None:
        found.append(kwargs.get("past_key_values", kwargs.get("cache")))

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
    assert len(found) == 4 and found[0] is not None and all(cache is found[0] for cache in found)


def test_factors_live_as_long_as_the_cache() -> None:
    model = adapted(Generator)[1]
    vectors = weakref.ref(model.one.hra_u["default"])
    with torch.no_grad():
        model.generate(X)
    del model
    gc.collect()
    assert vectors() is None


def test_generate_with_gradients_trains() -> None:
    base, model = adapted(Generator)
    assert_right(base, model, model.generate(X)[1])


CHANGES: dict[str, Callable[[Any], object]] = {
    "scale": lambda model: hra_fx.set_scale(model, "default", 0.0),
    "vectors": lambda model: model.one.hra_u["default"].add_(1.0),
    "load_state_dict": lambda model: model.load_state_dict(
        {name: -0.5 + tensor for name, tensor in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle_of_generate(change: str, guard: Any) -> None:
    sought: list[Tensor] = []

    def between(model: Any) -> None:
        if not sought:
            CHANGES[change](model)
            with torch.inference_mode(False):
                sought.append(hra_fx.fold(copy.deepcopy(model))(X).detach())

    with guard():
        first, second, _ = adapted(Generator, r=2)[1].generate(X, between)
    assert relative_error(second, sought[0]) < 1e-12
    assert relative_error(second, first) > 1e-3
