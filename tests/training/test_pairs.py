"""train_pairs against an oracle whose parameters are sums and differences; with closures, errors and saved states."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import adapting
import bitsandbytes
import peft
import pytest
import timm
import torch
from adapting import randomise
from moe_models import built, call_of, experts_config
from oracles import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LinearLR

import hra_fx
from hra_fx import AdapterError, ConfigError, HRAConfig, HRAWarning, train_pairs

C = 0.3
F64 = torch.float64
AdamW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


class TwoSteps(torch.optim.RMSprop):
    def step(self, closure: Any = None) -> Any:
        super().step()
        return super().step(closure)


OPTIMIZERS: dict[str, Any] = {
    "AdamW": AdamW,
    "AdamW, fused": partial(AdamW, fused=True),
    "AdamW, foreach": partial(AdamW, foreach=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.02),
    "Adagrad, which has a state before its first step": partial(torch.optim.Adagrad, lr=0.02),
    "a step around those of the base class": partial(TwoSteps, lr=0.02),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(F64)


def adapted(**fields: Any) -> nn.Module:
    """With random vectors."""
    return adapting.adapted(base(), **{"r": 4, "target_modules": ["0", "2"]} | fields)


def vectors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: vectors for name, vectors in model.named_parameters() if ".hra_u." in name and vectors.requires_grad}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}


def loss_of(model: Any, step: int = 0, dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(step)
    return model(torch.randn(8, 6).to(dtype)).square().mean()


def length_of(vectors: Tensor) -> float:
    """The root mean square length of new vectors: half as many columns have entries below `1 / sqrt(columns)`."""
    return math.sqrt(vectors.shape[-2] * 2 / (3 * vectors.shape[-1]))


def vectors_from(m: Tensor, d: Tensor) -> Tensor:
    """The vectors, by their definition."""
    length = length_of(torch.cat([m, d], -1))
    pairs = [length * (m[..., i] + sign * C * d[..., i]) for i in range(m.shape[-1]) for sign in (1, -1)]
    return torch.stack(pairs, dim=-1)


def explicit_pairs(
    model: nn.Module, *, joint: bool = False
) -> tuple[list[nn.Parameter], Callable[[], dict[str, Tensor]]]:
    """Parameters for sums and differences, and a function that returns the vectors; `joint`: one parameter for both."""
    held: dict[str, list[nn.Parameter]] = {}
    for name, vectors in values_of(model).items():
        length = length_of(vectors)
        a, b = vectors[..., ::2], vectors[..., 1::2]
        m, d = (a + b) / (2 * length), (a - b) / (2 * length * C)
        held[name] = [nn.Parameter(one) for one in ([torch.stack([m, d], -1).flatten(-2)] if joint else [m, d])]

    def now() -> dict[str, Tensor]:
        parts = {name: (one[0][..., ::2], one[0][..., 1::2]) if joint else one for name, one in held.items()}
        return {name: vectors_from(*both) for name, both in parts.items()}

    return [one for both in held.values() for one in both], now


def by_oracle(
    model: nn.Module, make: Any, loss: Any = loss_of, *, steps: int = 3, joint: bool = False
) -> dict[str, Tensor]:
    """The vectors after some steps of an optimizer whose parameters are sums and differences."""
    held, now = explicit_pairs(model, joint=joint)
    optimizer = make(held)
    for step in range(steps):
        optimizer.zero_grad()
        loss(lambda *args, **kwargs: functional_call(model, now(), args, kwargs), step).backward()
        optimizer.step()
    return now()


def by_pairs(model: nn.Module, make: Any, loss: Any = loss_of) -> dict[str, Tensor]:
    optimizer = make(vectors_of(model).values())
    train_pairs(optimizer, model, C)
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return values_of(model)


def same(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert relative_error(actual[name], wanted[name].detach()) < tolerance, name


# ---- in use ----


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_after_an_interruption_everything_is_as_before(scheduler_first: bool) -> None:
    class Failing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            inside.append(self.param_groups[0]["params"][0].clone())
            raise KeyboardInterrupt

    model, inside = adapted(), []
    optimizer = Failing(vectors_of(model).values())
    if scheduler_first:
        LinearLR(optimizer)
    train_pairs(optimizer, model)
    loss_of(model).backward()
    before = values_of(model)
    gradients = [(p.grad, p.grad.clone()) for p in vectors_of(model).values()]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not torch.equal(inside[0], next(iter(before.values()))), "it failed in pair coordinates"
    same(values_of(model), before, 1e-300)
    for vectors, (own, copied) in zip(vectors_of(model).values(), gradients, strict=True):
        assert vectors.grad is own
        assert torch.equal(own, copied)


def test_a_closure_runs_in_vectors() -> None:
    """LBFGS calls it several times a step. Dot products do not depend on the order of coordinates."""
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

    def trained(optimizer: Any, loss: Callable[[], Any]) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        for _ in range(2):
            optimizer.step(closure)

    model = adapted()
    explicit = copy.deepcopy(model)
    optimizer = lbfgs(vectors_of(model).values())
    train_pairs(optimizer, model, C)
    trained(optimizer, lambda: loss_of(model))
    held, now = explicit_pairs(explicit)
    trained(lbfgs(held), lambda: loss_of(lambda x: functional_call(explicit, now(), x)))
    same(values_of(model), now(), 1e-9)


def test_a_step_that_a_scaler_skips_changes_nothing() -> None:
    """A fused optimizer is called also if a gradient is infinite."""
    model = adapted().float()
    optimizer = AdamW(vectors_of(model).values(), fused=True)
    train_pairs(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = values_of(model)
    scaler.scale(loss_of(model, dtype=torch.float32) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], vectors) for name, vectors in vectors_of(model).items())


def test_a_saved_state_continues_and_another_one_is_refused(tmp_path: Path) -> None:
    model = adapted()
    optimizer = AdamW(vectors_of(model).values())
    plain = copy.deepcopy(optimizer.state_dict())
    train_pairs(optimizer, model, C)
    train_pairs(optimizer, model, C)  # has no further effect
    loss_of(model).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)

    resumed = copy.deepcopy(model)
    after = AdamW(vectors_of(resumed).values(), lr=1.0)
    train_pairs(after, resumed, C)
    after.load_state_dict(saved)
    for each, one in ((model, optimizer), (resumed, after)):
        one.zero_grad()
        loss_of(each, 1).backward()
        one.step()
    same(values_of(resumed), values_of(model), 1e-15)
    same(values_of(model), by_oracle(adapted(), AdamW, steps=2))

    with pytest.raises(AdapterError, match=r"difference=0.3, but the state was saved without pairs. Leave train_pairs"):
        after.load_state_dict(plain)
    with pytest.raises(AdapterError, match=r"trains pairs with difference=0.3, got 0.1. Create a new optimizer"):
        train_pairs(after, resumed)
    other = AdamW(vectors_of(resumed).values())
    train_pairs(other, resumed, 0.1)
    with pytest.raises(AdapterError, match=r"saved with difference=0.3. Call train_pairs\(..., difference=0.3\)"):
        other.load_state_dict(saved)
    stepped = AdamW(vectors_of(resumed).values())
    stepped.step()
    with pytest.raises(
        AdapterError, match=r"has a state of steps without pairs. Call train_pairs before the first step"
    ):
        train_pairs(stepped, resumed)


@pytest.mark.filterwarnings("ignore:.*trained vectors are torch.bfloat16:hra_fx.HRAWarning")
@pytest.mark.parametrize("averaged", [False, True])
def test_other_vectors_are_stepped_as_they_are_with_one_warning(averaged: bool) -> None:
    """An optimizer that averages parameters steps all of them so."""
    fields = {"odd": {"r": 3}, "orthonormal": {"apply_GS": True}, "narrow": {}, "even": {}}
    model = adapted(target_modules=["0"])
    for name, more in fields.items():
        hra_fx.add_adapter(model, name, HRAConfig(**{"r": 2, "target_modules": ["0"]} | more))
    hra_fx.set_adapter(model, list(fields))
    model[0].hra_u["narrow"].data = model[0].hra_u["narrow"].data.to(torch.bfloat16)
    randomise(model)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        optimizer = (torch.optim.ASGD if averaged else AdamW)(vectors_of(each).values(), lr=0.1)
        if each is model:
            wanted = "train_pairs: these vectors are not trained in pairs: " + (
                "0.hra_u.odd (the optimizer averages parameters outside of its"
                if averaged
                else "0.hra_u.odd (odd rank 3), 0.hra_u.orthonormal (Gram-Schmidt), 0.hra_u.narrow (bfloat16)."
            )
            with pytest.warns(HRAWarning, match=re.escape(wanted)):
                train_pairs(optimizer, model)
            assert ("hra_pair_difference" in optimizer.state_dict()["param_groups"][0]) is not averaged
        loss_of(each).backward()
        optimizer.step()
    equal = {name: torch.equal(model[0].hra_u[name], plain[0].hra_u[name]) for name in ("default", *fields)}
    assert equal == {"default": True, "odd": True, "orthonormal": True, "narrow": True, "even": averaged}


def test_adapters_of_other_ranks_and_those_that_are_added_later() -> None:
    model = adapted()
    hra_fx.add_adapter(model, "second", HRAConfig(r=2, target_modules=["0"]))
    hra_fx.set_adapter(model, ["default", "second"])
    optimizer = AdamW(vectors_of(model).values())
    train_pairs(optimizer, model, C)
    hra_fx.add_adapter(model, "third", HRAConfig(r=6, target_modules=["2"]))
    hra_fx.set_adapter(model, ["default", "third"])
    optimizer.add_param_group({"params": [model[2].hra_u["third"]]})
    randomise(model)
    explicit, idle = copy.deepcopy(model), model[0].hra_u["second"].clone()
    loss_of(model).backward()
    optimizer.step()
    same(values_of(model), by_oracle(explicit, AdamW, steps=1))
    assert torch.equal(model[0].hra_u["second"], idle)


def test_parameters_that_are_replaced_later_give_a_warning() -> None:
    """As DeepSpeed ZeRO does, which steps flat copies."""
    model = adapted()
    optimizer = AdamW(vectors_of(model).values())
    train_pairs(optimizer, model)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    with pytest.warns(
        HRAWarning, match=r"these vectors are not trained in pairs: 0 \(no longer a parameter of the optimizer\), 2 "
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("zero", [True, False])
def test_zero_gradients_of_all_vectors_give_one_warning(zero: bool) -> None:
    """The adapted layers of a new ResNet of timm are in blocks that end with a scale of zero, which is frozen."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, zero_init_last=zero)
    config = HRAConfig(r=2, target_modules=r"layer\d.*conv\d", modules_to_save=["fc"])
    hra_fx.transform(model, config)
    optimizer = AdamW(vectors_of(model).values())
    train_pairs(optimizer, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HRAWarning)
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32)).square().sum().backward()
            assert any(vectors.grad.any() for vectors in vectors_of(model).values()) is not zero
            optimizer.step()
    begin = "the gradients of all vectors are zero in the first step: layer1.0.conv1.hra_u.default, "
    assert [str(one.message).startswith(begin) for one in caught] == [True] * zero


def test_what_is_refused() -> None:
    model = adapted()
    optimizer = AdamW(vectors_of(model).values())
    for difference in (0, -1.0, math.inf, math.nan, True, "0.1"):
        with pytest.raises(ConfigError, match=r"`difference` must be a finite number > 0, got"):
            train_pairs(optimizer, model, difference)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"`optimizer` must be a torch.optim.Optimizer, got Sequential"):
        train_pairs(model, model)
    with pytest.raises(AdapterError, match=r"`model` must be a torch.nn.Module, got AdamW"):
        train_pairs(optimizer, optimizer)  # type: ignore[arg-type]
    for wrong in (base(), adapted()):
        with pytest.raises(AdapterError, match=r"the optimizer has no vectors of Sequential. Adapt the model first"):
            train_pairs(optimizer, wrong)
    assert "hra_pair_difference" not in optimizer.param_groups[0]


def test_the_8_bit_optimizer_of_bitsandbytes() -> None:
    """It quantizes blocks of several columns, so the oracle is one parameter with the same columns."""
    make = partial(bitsandbytes.optim.AdamW8bit, lr=0.02, min_8bit_size=16)
    model, loss = adapted().float(), partial(loss_of, dtype=torch.float32)
    wanted = by_oracle(copy.deepcopy(model), make, loss, joint=True)
    plain = copy.deepcopy(model)
    same(by_pairs(model, make, loss), wanted, 1e-4)
    # It does not call torch's hook for loading.
    optimizer, before = make(vectors_of(plain).values()), values_of(plain)
    saved = optimizer.state_dict()
    train_pairs(optimizer, plain)
    optimizer.load_state_dict(saved)
    loss(plain).backward()
    with pytest.raises(AdapterError, match="the state was saved without pairs"):
        optimizer.step()
    same(values_of(plain), before, 1e-300)


# ---- steps against an oracle ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_sums_and_differences(name: str) -> None:
    """Adafactor sees rows and columns, so the oracle is one parameter with the columns m, d, m, d, ..."""
    model = adapted()
    wanted = by_oracle(copy.deepcopy(model), OPTIMIZERS[name], joint=name == "Adafactor")
    same(by_pairs(model, OPTIMIZERS[name]), wanted)


@pytest.mark.needs("transformers>=5.6")
def test_experts_and_layers_of_peft() -> None:
    def loss(model: Any, step: int) -> Any:
        return model(**call_of("mixtral")).logits.square().mean()

    experts = hra_fx.transform(built("mixtral", implementation="eager"), experts_config())
    randomise(experts)
    same(by_pairs(copy.deepcopy(experts), AdamW, loss), by_oracle(experts, AdamW, loss))
    model = peft.get_peft_model(base(), peft.HRAConfig(r=4, init_weights=False, target_modules=["0", "2"]))
    for make in (copy.deepcopy, hra_fx.from_peft):
        model = make(model)
        same(by_pairs(copy.deepcopy(model), AdamW), by_oracle(model, AdamW), 1e-6)


@pytest.mark.parametrize("r", [2, 8])
def test_the_unit_of_pairs_is_the_length_of_new_vectors(r: int) -> None:
    model = hra_fx.transform(nn.Sequential(nn.Linear(4096, 1)), HRAConfig(r=r, target_modules=["0"]))
    drawn = model[0].hra_u["default"].detach()
    assert float(drawn.norm(dim=0).square().mean().sqrt()) == pytest.approx(length_of(drawn), rel=0.02)
