"""Nothing stays half done: an error or a warning finds every model as it was, or all the way there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.failing import At, folded, no_memory
from model.many import F64, adapted, assert_close, config, ids, llama, net, normal, oracle, run, seen, turn, weights
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import record_of

SAVED: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}


# Warnings that are errors


def test_the_warning_of_a_fold_finds_it_done() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    wanted = weights(plain, model, ["a"])
    with pytest.raises(hra_fx.HRAWarning, match=r"adapters \['b'\] were not active, and went with the fold"):
        hra_fx.fold(model)
    folded(plain, model, wanted)


def test_so_does_the_one_of_embeddings_that_stay_untied() -> None:
    plain, model = adapted(llama(tie_word_embeddings=True), a=config("q_proj", modules_to_save=["lm_head"]))
    head = model.lm_head.weight.detach().clone()
    wanted = weights(plain, model, ["a"])
    with pytest.raises(hra_fx.HRAWarning, match="embeddings stay untied, for one was trained"):
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
    with At(Tensor.clone, 10**9, no_memory) as at:
        hra_fx.merge_adapter(model)
    hra_fx.unmerge_adapter(model)
    assert at.calls >= 2
    before = {key: value for key, value in before.items() if not key.startswith("tensor")}
    for call in range(1, at.calls + 1):
        now = seen(model)
        with At(Tensor.clone, call, no_memory), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            hra_fx.merge_adapter(model)
        assert seen(model) == now
        assert {key: value for key, value in now.items() if not key.startswith("tensor")} == before
        assert torch.equal(run(model, x), output)
    wanted = weights(plain, model, ["a", "b"])
    hra_fx.merge_adapter(model)
    for name in wanted:
        assert_close(model.get_parameter(name), wanted[name], 1e-6)
    hra_fx.unmerge_adapter(model)
    for name in wanted:
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name))
    assert torch.equal(run(model, x), output)


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


# A capture that is refused later


class Flip(nn.Module):
    """Reads a weight itself once a flag is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.direct = False

    def forward(self, x: Tensor) -> Tensor:
        x, last = self.a(x), self.b
        # Not by the attribute's name, which the source would show.
        return nn.functional.linear(x, getattr(last, "wei" + "ght"), last.bias) if self.direct else last(x)


def flip(**configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return adapted(Flip().to(F64).eval(), **configs)


@pytest.mark.filterwarnings("ignore:adapter 'x' was active:hra_fx.HRAWarning")
def test_a_deletion_after_which_nothing_can_be_captured_is_whole() -> None:
    plain, model = flip(x=config("a", "b"), y=config("b"))
    x = normal(3, 6)
    both = oracle(plain, model, ["y"], x)
    model.direct = True
    hra_fx.delete_adapter(model, "x")
    record = record_of(model)
    assert (list(record.configs), record.active) == (["y"], ("y",))
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias", "b.hra_u.y"]
    assert type(model.a) is nn.Linear
    assert torch.equal(run(model, x), run(plain, x))  # which is what that forward says
    assert "b" in hra_fx.report(model).rows[0].path
    model.direct = False
    assert_close(run(model, x), both)
    hra_fx.set_adapter(model, "y")
    hra_fx.add_adapter(model, "x", config("a"))
    turn(model, seed=4)
    hra_fx.set_adapter(model, ["x", "y"])
    assert_close(run(model, x), oracle(plain, model, ["x", "y"], x))


def test_a_fold_of_one_after_which_nothing_can_be_captured_is_whole() -> None:
    plain, model = flip(x=config("a"), y=config("b"))
    hra_fx.set_adapter(model, ["x", "y"])
    x = normal(3, 6)
    wanted, without = oracle(plain, model, ["x", "y"], x), oracle(plain, model, ["x"], x)
    model.direct = True
    hra_fx.fold(model, "x")
    model.direct = False
    assert list(record_of(model).configs) == ["y"]
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias", "b.hra_u.y"]
    assert_close(run(model, x), wanted)
    with hra_fx.disable_adapters(model):
        assert_close(run(model, x), without)
    assert_close(run(hra_fx.fold(model), x), wanted)


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
