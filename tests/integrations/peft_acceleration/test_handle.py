"""The handle of `accelerate_peft`: what it changes, that it changes it back, and models of transformers in between."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import peft
import peft.tuners.hra.model as theirs
import pytest
import torch
from adapting import randomise
from canaries.canary import canary
from integrations.peft_acceleration.layers import adapted
from oracles import relative_error
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo import reset

import hra_fx
from hra_fx.layers.running import RUNNING, Run


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))


def model_of_peft() -> Any:
    model = adapted(plain(), "0", "2")
    randomise(model)
    return model


def classes(model: Any) -> list[type]:
    return [type(model.base_model.model[0]), type(model.base_model.model[2])]


X = torch.linspace(-1, 1, 36).view(2, 2, 3, 3)
PEFTS = [HRAConv2d, HRALinear]


def test_a_model_stays_pefts_in_all_but_its_computation() -> None:
    model = model_of_peft()
    wanted, text = model(X), repr(model)
    entries, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    with hra_fx.accelerate_peft(model) as handle:
        assert len(handle.layers) == 2
        assert classes(model) != PEFTS
        assert all(issubclass(kind, own) for kind, own in zip(classes(model), PEFTS, strict=True))
        assert [kind.__qualname__ for kind in classes(model)] == ["HRAConv2d", "HRALinear"]
        assert repr(model) == text
        assert list(model.state_dict()) == entries
        assert [name for name, _ in model.named_modules()] == modules
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert relative_error(model(X), wanted) < 1e-5
    assert classes(model) == PEFTS
    assert [key for key in vars(model.base_model.model[0]) if key.startswith("_hra")] == []
    assert torch.equal(model(X), wanted)


def new_vectors() -> list[Tensor]:
    torch.manual_seed(3)
    return list(adapted(plain(), "0", "2", r=2, init_weights=True).state_dict().values())


def test_models_made_later_are_accelerated_until_it_is_closed() -> None:
    handle = hra_fx.accelerate_peft()
    model = model_of_peft()
    fast = classes(model)
    assert fast != PEFTS
    assert [theirs.HRAConv2d, theirs.HRALinear] == fast
    got, drawn = model(X), new_vectors()
    handle.close()
    handle.close()
    assert [theirs.HRAConv2d, theirs.HRALinear] == PEFTS
    assert classes(model) == PEFTS
    assert relative_error(got, model(X)) < 1e-5
    assert classes(model_of_peft()) == PEFTS
    assert all(map(torch.equal, drawn, new_vectors())), "the same seed draws the same vectors"


def test_nested_handles_in_any_order() -> None:
    model = model_of_peft()
    outer, inner = hra_fx.accelerate_peft(), hra_fx.accelerate_peft()
    made = model_of_peft()
    first, second = hra_fx.accelerate_peft(model), hra_fx.accelerate_peft(model)
    first.close()
    outer.close()
    assert theirs.HRALinear is not HRALinear
    assert PEFTS not in (classes(model), classes(made))
    second.close()
    assert classes(model) == PEFTS
    inner.close()
    assert theirs.HRALinear is HRALinear
    assert classes(made) == PEFTS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_vectors(copied: Any) -> None:
    model = model_of_peft()
    with hra_fx.accelerate_peft(model):
        wanted = model(X)
        other = copied(model)
        randomise(model, seed=5)
        assert torch.equal(other(X), wanted)
        randomise(other, seed=5)
        assert torch.equal(other(X), model(X))
    assert classes(model) == PEFTS != classes(other)
    hra_fx.accelerate_peft(other).close()
    assert classes(other) == PEFTS


def test_files_are_byte_for_byte_pefts(tmp_path: Path) -> None:
    model = model_of_peft()
    model.save_pretrained(tmp_path / "plain")
    with hra_fx.accelerate_peft(model):
        model.save_pretrained(tmp_path / "fast")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    with hra_fx.accelerate_peft():
        for options in ({}, {"low_cpu_mem_usage": True}):
            loaded = peft.PeftModel.from_pretrained(plain(), tmp_path / "fast", **options)
            assert classes(loaded) != PEFTS
            assert relative_error(loaded(X), model(X)) < 1e-5
        assert relative_error(loaded.merge_and_unload()(X), model(X)) < 1e-5


def test_an_oblong_kernel_starts_as_the_base_model() -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, (1, 3), groups=2))
    with hra_fx.accelerate_peft():
        model = adapted(base, "0", init_weights=True)
        assert model.base_model.model[0].hra_u["default"].shape == (6, 4)
        x = torch.randn(2, 4, 5, 5)
        assert relative_error(model(x), base(x)) < 1e-6
        with pytest.raises(ValueError, match="should be a positive integer"):
            adapted(base, "0", r=0)


def test_refused_models() -> None:
    model = hra_fx.transform(plain(), hra_fx.HRAConfig(r=2, target_modules=["2"]))
    with pytest.raises(hra_fx.AdapterError, match=r"Sequential has no HRA layers of PEFT.*use these kernels"):
        hra_fx.accelerate_peft(model)
    model = adapted(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(4, 6, (1, 3))), "0", "1")
    with pytest.raises(
        hra_fx.AdapterError,
        match=r"base_model.model.1: PEFT created the vectors of 'default' with length 4.*12 entries",
    ):
        hra_fx.accelerate_peft(model)
    assert type(model.base_model.model[0]) is HRALinear


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.hra", None)
    with pytest.raises(ImportError, match=r"^accelerate_peft needs PEFT with HRA\. Run: pip install peft\.$"):
        hra_fx.accelerate_peft()


# Names that transformers has had since 5.0, and means to rename; PEFT uses them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]
TOKENS = torch.randint(3, 37, (3, 7), generator=torch.Generator().manual_seed(1))


def llama(dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A PeftModel over a tiny Llama, with random vectors."""
    model = adapted(tiny("llama", dtype), *TARGETS, **({"task_type": "CAUSAL_LM"} | fields)).to(dtype)
    randomise(model)
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    return {"loss": loss.detach()} | {name: grad.clone() for name, grad in trained.items()}


@pytest.mark.parametrize("apply_GS", [False, True], ids=["plain", "GS"])
def test_gradients_are_pefts(apply_GS: bool) -> None:
    model = llama(apply_GS=apply_GS, r=2, bias="hra_only", modules_to_save=["norm"])
    wanted = gradients(model)
    with hra_fx.accelerate_peft(model):
        found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative_error(found[name], value, floor=1e-3) < 1e-9, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_bfloat16_model_with_gradient_checkpointing_under_autocast(use_reentrant: bool) -> None:
    """Compared with PEFT's gradients in float32; rounding activations to bfloat16 changes them by up to 5%."""
    model = adapted(tiny("llama", torch.bfloat16), *TARGETS, task_type="CAUSAL_LM").train()
    randomise(model)
    wanted = gradients(copy.deepcopy(model).float())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with hra_fx.accelerate_peft(model), torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, relative_error(found[name], value) < 0.1) == (torch.float32, True), name


@pytest.mark.needs("torch>=2.9")
def test_it_compiles_as_one_graph() -> None:
    model = adapted(plain(), "0", "2", r=2, apply_GS=True).double()
    randomise(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.linspace(-1, 1, 36, dtype=torch.float64).view(2, 2, 3, 3)
    wanted = torch.autograd.grad(model(x).square().sum(), trained)
    hra_fx.accelerate_peft(model)
    reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), trained)
    assert all(relative_error(one, other) < 1e-9 for one, other in zip(got, wanted, strict=True))


@canary(
    "peft",
    "`_enable_peft_forward_hooks` of the inner model, which a `PeftModel` enters around forward and `generate`",
    reader="hra_fx/integrations/peft_acceleration.py",
    breaks="the batched factors of accelerate_peft: each layer would compute its own",
)
def test_factors_are_batched_in_a_forward_of_a_peft_model() -> None:
    model, seen = model_of_peft(), list[bool]()
    with hra_fx.accelerate_peft(model):
        layer = model.base_model.model[2]
        layer.register_forward_hook(lambda *_: seen.append(layer.acting().hra_u in (RUNNING.run or Run()).factors))
        model(X)
        model.get_base_model()(X)
    assert seen == [True, False]
