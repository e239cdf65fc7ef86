"""Outputs and gradients with factors that are computed in batches, also in `generate` and in 16 bits."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from layers.checking import pair, run_dense, vectors_of
from layers.reading_weights import assert_gradients
from one_layer import BF16, F32, F64, normal
from oracles import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
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


def test_a_state_of_another_dtype_that_replaces_the_tensors() -> None:
    base, model = adapted(dtype=F32)
    model(X.float())
    model.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()}, assign=True)
    assert_right(base.double(), model, model(X))


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


# ---- within a forward ----


def change(model: Any) -> None:
    """Change the vectors of two layers in place, as optimizers and `load_state_dict` do."""
    with torch.no_grad():
        model.two.hra_u["default"].copy_(normal(61, *model.two.hra_u["default"].shape))
        model.three.load_state_dict({**model.three.state_dict(), "hra_u.default": normal(62, 7, 1, 2)})


def fused_step(model: Any) -> None:
    """A step that does not change the versions of tensors, for a loss of the layers themselves."""
    with torch.enable_grad():
        model.three(model.two(X)).square().sum().backward()
    torch.optim.SGD([model.two.hra_u["default"], model.three.hra_u["default"]], 0.5, fused=True).step()
    model.zero_grad()


def other_memory(model: Any) -> None:
    model.two.hra_u["default"].data = normal(63, 12, 1, 2)


def other_parameter(model: Any) -> None:
    model.two.hra_u["default"] = nn.Parameter(normal(64, 12, 1, 2))


#: A change, and the adapters that act after it.
CHANGES: dict[str, tuple[Callable[[Any], object], Sequence[str]]] = {
    "in place": (change, ["default"]),
    "a fused step": (fused_step, ["default"]),
    "other memory": (other_memory, ["default"]),
    "another parameter": (other_parameter, ["default"]),
    "another adapter": (lambda model: hra_fx.set_adapter(model, "other"), ["other"]),
    "two adapters": (lambda model: hra_fx.set_adapter(model, ["default", "other"]), ["default", "other"]),
    "a scale": (lambda model: hra_fx.set_scale(model, "default", 0.0), []),
}


def with_two_adapters(make: Callable[[], nn.Module] = Net) -> tuple[nn.Module, Any]:
    """The second adapter is not active."""
    base, model = adapted(make, r=2)
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=3, target_modules="all-linear", init_weights=False))
    return base, model


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_a_forward_counts_from_then_on(name: str, grad: bool) -> None:
    """As in test-time training, where a forward calls layers, makes a step of an optimizer, and calls layers again."""
    base, model = with_two_adapters()
    act, adapters = CHANGES[name]
    hidden = model.one(X).detach()
    base.one.register_forward_hook(lambda *_: hidden)
    before = run_dense(base, model, X)

    def once(*_: object) -> None:
        handle.remove()
        act(model)

    handle = model.one.register_forward_hook(once)
    with torch.set_grad_enabled(grad):
        found = model(X)
    wanted = run_dense(base, model, X, adapters=adapters)
    assert relative_error(found, wanted) < 1e-12 and relative_error(found, before) > 1e-3
    if grad and adapters:
        leaves = [layer.hra_u[adapter] for layer in (model.two, model.three) for adapter in adapters]
        assert_gradients(found, wanted, leaves)


class Parts(Net):
    """Calls its layers by a function of the test."""

    use: Callable[[nn.Module, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.use(self.two, torch.tanh(self.one(x)))))


def test_a_part_with_gradients_in_a_forward_without_them() -> None:
    base, model = adapted(Parts)
    base.use = lambda layer, x: layer(x)
    model.use = torch.enable_grad()(base.use)
    kept: list[Tensor] = []
    model.two.register_forward_hook(lambda layer, args, output: kept.append(output))
    with torch.no_grad():
        assert relative_error(model(X), run_dense(base, model, X)) < 1e-12
    assert torch.autograd.grad(kept[0].sum(), model.two.hra_u["default"])[0].any()


def test_a_part_with_other_vectors() -> None:
    base, model = adapted(Parts, r=2)
    base.use, other = (lambda layer, x: layer(x)), normal(65, 12, 1, 2)
    model.use = lambda layer, x: torch.func.functional_call(layer, {"hra_u.default": other}, (x,))
    found = model(X)
    with torch.no_grad():
        model.two.hra_u["default"].copy_(other)
    assert relative_error(found, run_dense(base, model, X)) < 1e-12


def test_a_part_that_selective_checkpointing_runs_again() -> None:
    """It counts operators, so the first run must have those of the second one."""
    base, model = adapted(Parts)
    base.use = lambda layer, x: layer(x)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model.use = lambda layer, x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    assert_right(base, model, model(X))


def test_a_hook_on_a_container_runs_from_now_on() -> None:
    base, model = adapted()
    model(X)
    called: list[object] = []
    model.two.hra_u.register_forward_pre_hook(lambda *_: called.append(None))
    assert_right(base, model, model(X))
    assert len(called) == 1


# ---- forwards within one call of `generate` use the factors of the first one ----


class Generator(Net):
    """Calls itself several times, as language models do."""

    def generate(self, x: Tensor, between: Callable[[Any], object] = lambda model: None) -> list[Tensor]:
        found = []
        for _ in range(3):
            found.append(self(x))
            between(self)
        return found


def solves(function: Callable[[], object]) -> int:
    """The number of times that factors are computed: each time needs one triangular solve."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name == "aten::linalg_solve_triangular" for event in profile.function_events)


def test_generate_computes_factors_once_for_all_tokens_and_models() -> None:
    """A second model proposes tokens, and calls its own `generate` for each of them."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config, ids = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=8), torch.tensor([[1, 2]])
    one, two = [
        hra_fx.transform(LlamaForCausalLM(config), hra_fx.HRAConfig(r=2, target_modules=["q_proj", "k_proj"]))
        for _ in range(2)
    ]
    tokens = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    calls: list[object] = []
    one.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        once = solves(lambda: one(ids))
        assert once > 0 and solves(lambda: (one(ids), one(ids))) == 2 * once
    calls.clear()
    assert solves(lambda: one.generate(input_ids=ids, **tokens)) == once and len(calls) == 6
    assert solves(lambda: one.generate(input_ids=ids, assistant_model=two, **tokens)) == 2 * once


def test_factors_live_as_long_as_the_call() -> None:
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


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_the_middle_of_generate(name: str, guard: Any) -> None:
    base, model = with_two_adapters(Generator)
    act, adapters = CHANGES[name]
    wanted: list[Tensor] = []

    def between(model: Any) -> None:
        if not wanted:
            with torch.inference_mode(False):
                act(model)
                wanted.append(run_dense(base, model, X, adapters=adapters))

    with guard():
        first, second, third = model.generate(X, between)
    assert relative_error(second, wanted[0]) < 1e-12 and relative_error(third, wanted[0]) < 1e-12
    assert relative_error(second, first) > 1e-3
