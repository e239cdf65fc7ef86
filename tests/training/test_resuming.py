"""A stopped run goes on bit by bit, however it was saved; averages of weights; states of PEFT, of 0.4 and for PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from adapting import config, vectors_of
from model.many import refuses
from oracles import relative_error
from peft_sides import by_peft, by_us, plain_name
from timm.utils import ModelEmaV2
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hra_fx
from hra_fx.errors import AdapterError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
AdamW = partial(torch.optim.AdamW, lr=0.03, weight_decay=0.1, fused=True)


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def adapted(kind: str, seed: int, protect: slice | None = slice(2)) -> Any:
    fields: dict[str, Any] = {"odd rank": {"r": 3}, "Gram-Schmidt": {"apply_GS": True}}.get(kind, {})
    torch.manual_seed(seed)
    model = hra_fx.transform(base(), config("0", "2", **{"r": 4, **fields}))
    if kind == "two adapters":
        hra_fx.add_adapter(model, "other", config("2", r=2, bias="hra_only"))
        hra_fx.set_adapter(model, ["other", "default"])
    if kind == "protected" and protect:
        hra_fx.protect(model, [X[protect]], 2)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW([one for one in model.parameters() if one.requires_grad])


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(X.roll(step)).square().mean().backward()
        optimizer.step()


def by_state(model: Any, optimizer: Any, fresh: Any, folder: Path, *, assign: bool = False) -> tuple[Any, Any]:
    torch.save((model.state_dict(), optimizer.state_dict()), folder / "state")
    state, moments = torch.load(folder / "state", weights_only=True)
    fresh.load_state_dict(state, assign=assign)
    again = optimizer_of(fresh)
    again.load_state_dict(moments)
    return fresh, again


def by_accelerate(model: Any, optimizer: Any, fresh: Any, folder: Path) -> tuple[Any, Any]:
    for one, own in ((model, optimizer), (fresh, optimizer_of(fresh))):
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(one, own)
        (accelerator.save_state if one is model else accelerator.load_state)(str(folder / "state"))
    return prepared  # type: ignore[no-any-return]


def by_distributed_checkpoint(model: Any, optimizer: Any, fresh: Any, folder: Path) -> tuple[Any, Any]:
    again = optimizer_of(fresh)
    for one, own in ((model, optimizer), (fresh, again)):
        states = dict(zip(("model", "optimizer"), get_state_dict(one, own), strict=True))
        (dcp.save if one is model else dcp.load)(states, checkpoint_id=folder)
    set_state_dict(fresh, again, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return fresh, again


WAYS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "state_dict": by_state,
    "assigned state_dict": partial(by_state, assign=True),
    "accelerate": by_accelerate,
    "distributed checkpoint": by_distributed_checkpoint,
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", ["pairs", "odd rank", "Gram-Schmidt", "two adapters", "protected"])
@pytest.mark.parametrize("way", WAYS)
def test_six_steps_are_three_and_three(way: str, kind: str, tmp_path: Path) -> None:
    """The new model has other vectors, and protects nothing before it is loaded.

    A distributed checkpoint loads what the new model has, so there, the new model protects other directions.
    """
    whole, model = adapted(kind, 1), adapted(kind, 1)
    train(whole, optimizer_of(whole), range(6))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    again, own = WAYS[way](model, optimizer, adapted(kind, 2, slice(5, 7) if "distributed" in way else None), tmp_path)
    train(again, own, range(3, 6))
    wanted, found = whole.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == []
    assert torch.equal(again(X), whole(X)) and not torch.equal(again(X), base()(X))
    if kind == "protected":
        assert relative_error(again(X[:2]), base()(X[:2])) < 1e-6 < relative_error(again(X), base()(X))


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "AveragedModel with buffers": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True
    ),
    "ModelEmaV2": lambda model: ModelEmaV2(model, decay=0.8),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_that_of_pairs_and_protected(name: str) -> None:
    """Also the first average, which `AveragedModel` copies from the model at the first update."""
    model = adapted("protected", 1)
    averaged, optimizer = AVERAGES[name](model), optimizer_of(model)
    wanted = None if name.startswith("AveragedModel") else values_of(model)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        (averaged.update_parameters if name.startswith("AveragedModel") else averaged.update)(model)
        now = values_of(model)
        wanted = now if wanted is None else {key: 0.8 * wanted[key] + 0.2 * now[key] for key in now}
    assert wanted is not None
    for key, found in values_of(averaged.module).items():
        assert relative_error(found, wanted[key]) < 1e-6 < relative_error(found, now[key]), key
    assert relative_error(averaged.module(X[:2]), base()(X[:2])) < 1e-6
    fresh = adapted("protected", 2, None)
    fresh.load_state_dict(averaged.module.state_dict())
    assert torch.equal(fresh(X), averaged.module(X))


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_directions_raises_an_error_when_it_runs_or_is_loaded_or_saved(name: str, tmp_path: Path) -> None:
    """They are averages of different directions if `protect` is called again, so nothing is protected."""
    model = adapted("protected", 1)
    averaged = AVERAGES[name](model)
    update = averaged.update_parameters if name.startswith("AveragedModel") else averaged.update
    update(model)
    averaged.module(X)  # which has found its factors
    hra_fx.protect(model, [X[2:4]], 2)
    update(model)
    text = r"^(0|2)\.hra_u\.default_kept: its columns are not orthonormal, .* hra_fx\.unprotect\(model\)"
    acts = [averaged.module, averaged.module[0], lambda _: hra_fx.save_adapter(averaged.module, tmp_path)]
    for act in (*acts, lambda _: hra_fx.fold(averaged.module)):
        with pytest.raises(AdapterError, match=text):
            act(X[:, :6])
    state, wanted = averaged.module.state_dict(), model(X)
    for fresh in (model, hra_fx.transform(base(), config("0", "2", r=4), trace=True, example_inputs=X)):
        with refuses(fresh, text):
            fresh.load_state_dict(state)
    assert torch.equal(model(X), wanted)
    hra_fx.unprotect(averaged.module)
    hra_fx.protect(averaged.module, [X[:2]], 2)
    assert relative_error(averaged.module(X[:2]), base()(X[:2])) < 1e-6


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: pairs.detach().double() for key, pairs in vectors_of(model).items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_peft_or_of_0_4_is_for_vectors(assign: bool) -> None:
    """Those of PEFT have the names of its wrappers. Fused AdamW would take their moments for moments of pairs."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"], "init_weights": False}
    theirs, model = by_peft(base(), **fields), by_us(base(), **fields)
    state = {plain_name(key): tensor.clone() for key, tensor in theirs.state_dict().items()}
    before = model(X)
    for strict in (False, True):
        with pytest.raises(AdapterError, match=r"^0\.hra_u\.default: the state_dict has vectors, .* Nothing was"):
            model.load_state_dict(state, strict=strict, assign=assign)
    assert torch.equal(model(X), before)
    vectors = by_us(base(), **fields, pairs=False)
    vectors.load_state_dict(state, assign=assign)
    assert relative_error(vectors(X), theirs(X)) < 1e-6


def test_a_checkpoint_of_peft_is_not_resumed_in_pairs(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"], "init_weights": False}
    by_peft(base(), **fields).save_pretrained(tmp_path)
    model = hra_fx.from_peft(by_peft(base(), **fields))
    hra_fx.load_adapter(model, tmp_path, is_trainable=True)
    (tmp_path / "optimizer.pt").touch()
    before = model(X)
    with pytest.raises(AdapterError, match=r"is a checkpoint of a run that trained vectors, .* Delete .*optimizer\.pt"):
        hra_fx.load_adapter(model, tmp_path, is_trainable=True)
    assert torch.equal(model(X), before)
    hra_fx.load_adapter(model, tmp_path)


def test_pairs_are_not_taken_for_vectors() -> None:
    """By PEFT, and by adapters that train vectors."""
    fields: dict[str, Any] = {"r": 4, "target_modules": ["0", "2"]}
    state = {key: tensor for key, tensor in by_us(base(), **fields).state_dict().items() if ".hra_u." in key}
    theirs = by_peft(base(), **fields)
    for model, prefix in ((theirs, "base_model.model."), (by_us(base(), **fields, pairs=False), "")):
        for strict in (False, True):
            with pytest.raises(RuntimeError, match=r"size mismatch for .*0\.hra_u\.default: .*\[6, 2, 2\]"):
                model.load_state_dict({prefix + key: tensor for key, tensor in state.items()}, strict=strict)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*0\.hra_u\.default: .*\[6, 2, 2\]"):
        peft.set_peft_model_state_dict(
            theirs, {f"base_model.model.{key.removesuffix('.default')}": tensor for key, tensor in state.items()}
        )


def test_directions_of_another_shape_are_refused() -> None:
    state = adapted("protected", 1).state_dict()
    state["0.hra_u.default_kept"] = state["0.hra_u.default_kept"][1:]
    with pytest.raises(AdapterError, match=r"size mismatch for 0\.hra_u\.default_kept: .*\(6, 2\), .*\(5, 2\)"):
        adapted("protected", 2, None).load_state_dict(state, strict=False)


def test_parameters_alone_are_not_the_state_of_a_protected_adapter() -> None:
    model = adapted("protected", 1)
    with pytest.raises(hra_fx.AdapterError, match=r"^state_dict has no entry '0\.hra_u\.default_kept'\. Pass"):
        hra_fx.get_peft_model_state_dict(model, dict(model.named_parameters()))
