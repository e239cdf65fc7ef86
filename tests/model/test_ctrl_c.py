"""A Ctrl-C finds every model as it was, or all the way there."""

from __future__ import annotations

import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model.failing import At, ctrl_c, ctrl_c_in, folded
from model.many import adapted, assert_close, config, moved, net, normal, oracle, product, run, turn, weights
from torch import Tensor

import hra_fx
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.state import record_of

SAVED: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}


def test_a_ctrl_c_waits_for_the_end_of_the_block() -> None:
    done = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        ctrl_c()
        done.append("whole")
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is before


def test_one_of_another_thread_waits_too() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        timer = threading.Timer(0.01, ctrl_c)
        timer.start()
        timer.join()
        done.append("whole")
    assert done == ["whole"]


def test_blocks_inside_each_other_end_with_the_outermost() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            ctrl_c()
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_without_one_nothing_is_raised_and_the_handler_is_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted(), uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="its own"), uninterrupted():
        raise ValueError("its own")
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_in_another_thread_a_fold_runs_as_well() -> None:
    plain, model = adapted(net(), a=config("first", "second"))
    x, errors = normal(3, 6), []
    wanted = oracle(plain, model, ["a"], x)

    def work() -> None:
        try:
            hra_fx.fold(model)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert_close(run(model, x), wanted)


@pytest.mark.parametrize("write", [1, 2])
def test_a_ctrl_c_at_a_write_leaves_a_whole_fold(write: int) -> None:
    plain, model = adapted(net(), a=config("first", "second"))
    wanted = weights(plain, model, ["a"])
    plan = hra_fx.plan_fold(model)
    with At(Tensor.copy_, write, ctrl_c) as at, pytest.raises(KeyboardInterrupt):
        plan.apply()
    assert at.calls == 2
    folded(plain, model, wanted)


@pytest.mark.parametrize("step", ["forget", "remove", "release", "original_class", "restore", "drop_record"])
def test_a_ctrl_c_at_any_step_leaves_a_whole_fold(step: str) -> None:
    plain, model = adapted(net(), a=config("first", "second"))
    wanted = weights(plain, model, ["a"])
    plan = hra_fx.plan_fold(model)
    with ctrl_c_in(step), pytest.raises(KeyboardInterrupt):
        plan.apply()
    folded(plain, model, wanted)


@pytest.mark.parametrize("step", ["_write", "_adopt", "forget", "remove", "install"])
def test_a_ctrl_c_in_a_fold_of_one_leaves_the_other_acting(step: str) -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    hra_fx.merge_adapter(model)
    x = normal(3, 6)
    wanted, base = oracle(plain, model, ["a", "b"], x), oracle(plain, model, ["a"], x)
    plan = hra_fx.plan_fold(model, "a")
    with ctrl_c_in(step), pytest.raises(KeyboardInterrupt):
        plan.apply()
    assert record_of(model).active == ("b",)
    assert record_of(model).merged == ()
    assert_close(run(model, x), wanted)
    with hra_fx.disable_adapters(model):
        assert_close(run(model, x), base)
    hra_fx.delete_adapter(model, "b")
    assert_close(run(model, x), base)


@pytest.mark.parametrize("write", [1, 2])
def test_a_ctrl_c_in_a_merge_and_in_an_unmerge_leaves_it_whole(write: int) -> None:
    plain, model = adapted(net(torch.float32), a=config("first", "second"))
    x = normal(3, 6).float()
    before, wanted = run(model, x), weights(plain, model, ["a"])
    with At(Tensor.copy_, write, ctrl_c), pytest.raises(KeyboardInterrupt):
        hra_fx.merge_adapter(model)
    assert record_of(model).merged == ("a",)
    for name in wanted:
        assert_close(model.get_parameter(name), wanted[name], 1e-6)
    with At(Tensor.copy_, write, ctrl_c), pytest.raises(KeyboardInterrupt):
        hra_fx.unmerge_adapter(model)
    assert record_of(model).merged == ()
    for name in wanted:
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("step", ["remove", "take_off", "install", "settle_ties"])
def test_a_ctrl_c_in_a_deletion_leaves_the_follower_active(step: str) -> None:
    plain, model = adapted(net(), a=config("first", "second", **SAVED), b=config("second", modules_to_save=["head"]))
    x = normal(3, 6)
    hra_fx.set_adapter(model, "b")
    wanted = run(model, x)
    hra_fx.set_adapter(model, "a")
    with ctrl_c_in(step), pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("ignore", hra_fx.HRAWarning)
        hra_fx.delete_adapter(model, "a")
    record = record_of(model)
    assert (list(record.configs), record.active) == (["b"], ("b",))
    copied = ["head.hra_saved.base_layer.weight", "head.hra_saved.base_layer.bias"]
    assert list(model.state_dict()) == [
        *list(plain.state_dict())[:-2],
        "second.hra_u.b",
        *list(plain.state_dict())[-2:],
        *copied,
    ]
    assert_close(run(model, x), wanted)
    q = product(model.second, ["b"])
    assert_close(model.second(normal(2, 8)), normal(2, 8) @ q.T @ plain.second.weight.T + plain.second.bias)


@pytest.mark.parametrize("call", range(1, 4))
def test_a_ctrl_c_while_values_are_replaced_restores_them(call: int, tmp_path: Path) -> None:
    _, other = adapted(net(), a=config("first", "second", **SAVED))
    turn(other, seed=9)
    hra_fx.save_adapter(other, tmp_path)
    _, model = adapted(net(), a=config("first", "second", **SAVED))
    x = normal(3, 6)
    before = run(model, x)
    assert moved(before, run(other, x))
    with At(Tensor.copy_, call, ctrl_c), pytest.raises(KeyboardInterrupt):
        hra_fx.load_adapter(model, tmp_path, "a")
    assert_close(run(model, x), before, 1e-14)
    hra_fx.load_adapter(model, tmp_path, "a")
    assert_close(run(model, x), run(other, x), 1e-14)
