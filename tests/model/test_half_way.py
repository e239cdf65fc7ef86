"""After an error or a warning, a model is unchanged or completely changed, or at least computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.failing import At, folded, no_memory
from model.many import adapted, assert_close, config, ids, llama, net, normal, oracle, run, seen, stored, weights
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import record_of

SAVED: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}


# Warnings that are errors


def test_the_warning_of_a_fold_finds_it_done() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    wanted = weights(plain, model, ["a"])
    with pytest.raises(hra_fx.HRAWarning, match=r"adapters \['b'\] were not active and are removed"):
        hra_fx.fold(model)
    folded(plain, model, wanted)


def test_so_does_the_one_of_embeddings_that_stay_untied() -> None:
    plain, model = adapted(llama(tie_word_embeddings=True), a=config("q_proj", modules_to_save=["lm_head"]))
    head = model.lm_head.weight.detach().clone()
    wanted = weights(plain, model, ["a"])
    with pytest.raises(hra_fx.HRAWarning, match="embeddings stay untied because one was trained"):
        hra_fx.fold(model)
    folded(plain, model, {**wanted, "lm_head.weight": head})
    assert model.config.tie_word_embeddings is False
    inputs = ids()
    with torch.no_grad():
        plain.lm_head.weight = nn.Parameter(head)
    assert_close(run(model, inputs), torch.func.functional_call(plain, wanted, (), inputs).logits)


def test_the_warning_of_a_deletion_finds_the_follower_active() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["b"], x)
    with pytest.raises(hra_fx.HRAWarning, match="adapter 'a' was active and is deleted; 'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    record = record_of(model)
    assert (list(record.configs), record.active) == (["b"], ("b",))
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["second.hra_u.b"]
    assert_close(run(model, x), wanted)


# Memory that runs out


def test_a_merge_that_runs_out_of_memory_leaves_the_model_and_a_second_one_succeeds() -> None:
    plain, model = adapted(net(torch.float32), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x = normal(3, 6).float()
    before, output = seen(model), run(model, x)
    before = {key: value for key, value in before.items() if not key.startswith("tensor")}
    for call in (1, 2):
        with At(Tensor.clone, call, no_memory), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            hra_fx.merge_adapter(model)
        assert {key: value for key, value in seen(model).items() if not key.startswith("tensor")} == before
        assert all(torch.equal(stored(model, name), value) for name, value in plain.named_parameters())
        assert torch.equal(run(model, x), output)
    wanted = weights(plain, model, ["a", "b"])
    hra_fx.merge_adapter(model)
    for name in wanted:
        assert_close(stored(model, name), wanted[name], 1e-6)
    hra_fx.unmerge_adapter(model)
    for name in wanted:
        assert torch.equal(stored(model, name), plain.get_parameter(name))
    assert torch.equal(run(model, x), output)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory is left."), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("merged", [False, True])
def test_an_interrupted_fold_leaves_the_outputs_and_a_second_one_finishes_it(error: Any, merged: bool) -> None:
    def fail() -> None:
        raise error

    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x, wanted = normal(3, 6), weights(plain, model, ["a", "b"])
    output = run(model, x)
    if merged:
        hra_fx.merge_adapter(model, "a")
    # The third and fourth: an unmerge writes two weights first.
    with At(Tensor.copy_, 4 if merged else 2, fail), pytest.raises(type(error)):
        hra_fx.fold(model)
    assert_close(stored(model, "first.weight"), wanted["first.weight"])
    assert_close(run(model, x), output)
    hra_fx.fold(model)
    folded(plain, model, wanted)


def each_failing_clone(make: Callable[[], nn.Module], act: Callable[[nn.Module], object], x: Tensor) -> nn.Module:
    """Let every clone of `act` fail once: the model is as it was each time. Gives one where none failed."""
    model, other = make(), make()
    with At(Tensor.clone, 10**9, no_memory) as at:
        act(other)
    assert at.calls >= 2
    for call in range(1, at.calls + 1):
        before, output = seen(model), run(model, x)
        with At(Tensor.clone, call, no_memory), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            act(model)
        assert seen(model) == before
        assert torch.equal(run(model, x), output)
    act(model)
    return model


def test_an_adapter_whose_copies_fail_leaves_the_model_as_it_was() -> None:
    def make() -> nn.Module:
        return adapted(net(), a=config("first", **SAVED))[1]

    x = normal(3, 6)
    model = each_failing_clone(make, lambda model: hra_fx.add_adapter(model, "b", config("second", **SAVED)), x)
    plain = net()
    hra_fx.set_adapter(model, "b")
    assert_close(run(model, x), oracle(plain, model, ["b"], x))


@pytest.mark.parametrize("beside", [False, True])
def test_a_file_whose_copies_fail_leaves_the_model_as_it_was(beside: bool, tmp_path: Path) -> None:
    _, source = adapted(net(), a=config("first", "second", **SAVED))
    hra_fx.save_adapter(source, tmp_path)

    def make() -> nn.Module:
        return adapted(net(), z=config("second"))[1] if beside else net()

    x = normal(3, 6)
    model = each_failing_clone(make, lambda model: hra_fx.load_adapter(model, tmp_path, "a"), x)
    hra_fx.set_adapter(model, "a")
    assert_close(run(model, x), run(source, x), 1e-14)
    assert not any(part.endswith("base_layer") for part in net().state_dict())


# A state that does not fit


@pytest.mark.parametrize("rank", [2, 3])
def test_a_state_that_has_no_strength_is_refused_with_its_layer(rank: int) -> None:
    """A zero column leaves an odd number of reflections: no rotation."""
    plain, model = adapted(net(), a=config("first", "second", r=rank))
    hra_fx.set_scale(model, "a", 0.5)
    x = normal(3, 6)
    output, boxes = run(model, x), (model.first.hra_u, model.second.hra_u)
    before = [(dict(box.scales), dict(box.paused), [p.requires_grad for p in box.parameters()]) for box in boxes]
    good = {name: value.clone() for name, value in model.state_dict().items()}
    bad = {name: value.clone() for name, value in good.items()}
    bad["first.hra_u.a"][:, 0] = 0
    with pytest.raises(RuntimeError, match=r"first\.hra_u\.a: .*odd|first\.hra_u\.a: .*rotation"):
        model.load_state_dict(bad)
    assert before == [
        (dict(box.scales), dict(box.paused), [p.requires_grad for p in box.parameters()]) for box in boxes
    ]
    assert before[0][:2] == ({"a": 0.5}, {"a": True})
    model.load_state_dict(good)
    assert_close(run(model, x), output, 1e-14)
    hra_fx.set_scale(model, "a", 1)
    assert_close(run(model, x), oracle(plain, model, ["a"], x))
    assert [name for name, value in model.named_parameters() if value.requires_grad] == [
        "first.hra_u.a",
        "second.hra_u.a",
    ]
