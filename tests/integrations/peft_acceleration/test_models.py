"""Accelerated models of transformers: PEFT's gradients, in every way in which they are trained and run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from integrations.peft_acceleration.layers import adapted, turn
from oracles import relative_error
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo import reset
from torch.profiler import profile

import hra_fx

# Names that transformers has had since 5.0, and means to rename; PEFT uses them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]
TOKENS = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))


def llama(dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A PeftModel over a tiny Llama, with random vectors."""
    model = adapted(tiny("llama", dtype), *TARGETS, **({"task_type": "CAUSAL_LM"} | fields)).to(dtype)
    turn(model)
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    return {"loss": loss.detach()} | {name: grad.clone() for name, grad in trained.items()}


def agree(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = 1e-9) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative_error(got[name], value, floor=1e-3) < bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("apply_GS", [False, True], ids=["plain", "GS"])
def test_gradients_are_pefts(apply_GS: bool, dtype: torch.dtype) -> None:
    model = llama(dtype, apply_GS=apply_GS, r=2, bias="hra_only", modules_to_save=["norm"])
    wanted = gradients(model)
    with hra_fx.accelerate_peft(model):
        agree(gradients(model), wanted, 1e-4 if dtype is torch.float32 else 1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = llama()
    wanted = gradients(model)
    hra_fx.accelerate_peft(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    agree(gradients(model), wanted)


def test_it_compiles_as_one_graph() -> None:
    base = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model = adapted(base, "0", "2", "4", r=2, apply_GS=True).double()
    turn(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(2, 2, 3, 3)
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    hra_fx.accelerate_peft(model)
    reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), trained)
    assert all(relative_error(one, other) < 1e-9 for one, other in zip(got, wanted, strict=True))


def test_generate_is_pefts() -> None:
    model = llama(torch.float32).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=TOKENS, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=TOKENS, **options), wanted)
    with hra_fx.accelerate_peft(model):
        assert torch.equal(model.generate(input_ids=TOKENS, **options), wanted)


def test_the_factors_of_all_layers_are_computed_in_one_batch() -> None:
    model = llama(torch.float32).eval()
    model.generation_config.pad_token_id = 0
    hra_fx.accelerate_peft(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert solves(lambda: model(TOKENS)) == 1
    assert solves(lambda: model.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False)) == 1
    assert solves(lambda: layer(torch.ones(1, 16))) == 1
    assert solves(lambda: model.get_base_model()(TOKENS)) == 8, "called without the PeftModel: one for each layer"
    with model.disable_adapter():
        assert solves(lambda: model(TOKENS)) == 0


def solves(call: Callable[[], object]) -> int:
    """How many triangular systems a call solves: one for each batch of layers."""
    with profile() as recorded:
        call()
    return sum(event.count for event in recorded.key_averages() if event.key == "aten::linalg_solve_triangular")


def test_adapters_that_are_disabled_merged_and_unloaded() -> None:
    model = llama().eval()
    hra_fx.accelerate_peft(model)
    wanted, base = model(TOKENS).logits, tiny("llama")(TOKENS).logits
    assert relative_error(wanted, base) > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, base)
    model.merge_adapter()
    assert relative_error(model(TOKENS).logits, wanted) < 1e-12
    with model.disable_adapter():
        assert relative_error(model(TOKENS).logits, base) < 1e-12
    assert relative_error(model(TOKENS).logits, wanted) < 1e-12
    assert relative_error(model.merge_and_unload()(TOKENS).logits, wanted) < 1e-12


def test_a_model_into_which_the_adapter_is_injected() -> None:
    """As transformers and diffusers do it, without a PeftModel."""
    base = tiny("llama", torch.float32)
    with hra_fx.accelerate_peft():
        config = peft.HRAConfig(r=2, target_modules=TARGETS, init_weights=False)
        model = peft.inject_adapter_in_model(config, copy.deepcopy(base))
        assert len(hra_fx.accelerate_peft(model).layers) == 8
        fast = model(TOKENS).logits
    hra_fx.accelerate_peft(model).close()
    assert relative_error(fast, model(TOKENS).logits) < 1e-5
    assert relative_error(fast, base(TOKENS).logits) > 1e-2


def test_a_second_adapter_with_more_layers() -> None:
    model = llama(adapter="first")
    hra_fx.accelerate_peft(model)
    with hra_fx.accelerate_peft() as handle:
        model.add_adapter("second", peft.HRAConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False))
        assert len(handle.layers) == 2
        model.double().set_adapter("second")
        got = gradients(model)
    assert len(got) == 1 + 4
    agree(got, gradients(model))
