"""`protect` with `previous`: what a model learned in earlier tasks stays, without the samples of these tasks."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from tiny import llama
from torch import Tensor, nn
from training.test_protect import CASES, F64, adapted, output_of, trained, words

import hra_fx
from hra_fx.errors import AdapterError, ConfigError, HRAWarning

#: The samples of three tasks. Those of the first two have fewer independent inputs than are protected.
TASKS = [torch.tensor([ids]) for ids in ([5, 9], [7, 1], [11, 4])]


@pytest.mark.parametrize("name", ["Llama", "Gram-Schmidt", "experts", "attention"])
def test_outputs_for_the_samples_of_all_earlier_tasks_stay(name: str) -> None:
    make, _, _, fields = CASES[name]
    tasks: list[Any] = TASKS if name == "attention" else [words(ids) for ids in TASKS]
    model, kept, learned = make().to(F64).eval(), None, []
    for number, task in enumerate(tasks):
        model = adapted(model, **fields)
        if number:
            kept = hra_fx.protect(model, [tasks[number - 1]], 4, kept)
        trained(model, task)
        model = hra_fx.fold(model)
        learned.append(output_of(model, task))
        for before, sample in zip(learned[:-1], tasks, strict=False):
            assert relative_error(output_of(model, sample), before) < 1e-8
    assert kept is not None and {basis.shape[-1] for basis in kept.directions.values()} <= set(range(5, 9))
    assert relative_error(output_of(make().to(F64).eval(), tasks[2]), learned[2]) > 0.01


def test_earlier_directions_come_first_and_new_ones_are_the_most_of_the_rest() -> None:
    """The oracle: singular values of the inputs without their parts in earlier directions."""
    base = llama().to(F64).eval()
    model, path = adapted(copy.deepcopy(base), "q_proj", "k_proj"), "model.layers.0.self_attn.q_proj"
    first, second = torch.randint(0, 64, (2, 4, 16), generator=torch.Generator().manual_seed(3))
    torch.save(hra_fx.protect(model, [first], 6).directions, file := io.BytesIO())
    file.seek(0)
    before = torch.load(file, weights_only=True)
    found = hra_fx.protect(model, [second], 5, before)
    after = found.directions[path]
    assert found.directions.keys() == before.keys() and torch.equal(after[:, :6], before[path])
    torch.testing.assert_close(after.mT @ after, torch.eye(11, dtype=F64))
    rows: list[Tensor] = []
    base.get_submodule(path).register_forward_pre_hook(lambda _, x: rows.append(x[0][0]))
    for text in second:
        base(text[None])
    inputs = torch.cat(rows)
    rest = inputs @ (torch.eye(32, dtype=F64) - before[path] @ before[path].mT)
    best = torch.linalg.svdvals(rest)[5:].square().sum()
    assert (rest - rest @ after @ after.mT).square().sum() < 1.05 * best
    held = ((inputs @ after).square().sum() / inputs.square().sum()).detach()
    assert found.shares[path] == pytest.approx(float(held), abs=0.02)


class Branches(nn.Module):
    """Two layers, of which a batch reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, right: bool = False) -> Tensor:
        return self.right(x) if right else self.left(x)


def test_a_second_call_replaces_the_directions_and_names_layers_that_no_sample_reached() -> None:
    """The layer does not jump at a call, whatever the optimizer did along directions that were protected before."""
    model = adapted(Branches(), "left", "right", r=2)
    x, y, z = torch.randn(3, 2, 8)
    with pytest.warns(HRAWarning, match=r"^protect: `samples` do not protect these layers, .*: right\.$"):
        kept = hra_fx.protect(model, [x], 2)
    assert {path: tuple(basis.shape) for path, basis in kept.directions.items()} == {"left": (8, 2)}
    assert {row.path: row.moved is None for row in hra_fx.report(model)} == {"left": False, "right": True}
    trained(model, z)
    before = model(z)
    with pytest.warns(HRAWarning, match=r"these layers, .*: left\.$"):
        both = hra_fx.protect(model, [(x, True)], 2, kept)
    assert both.directions.keys() == {"left", "right"} and both.shares.keys() == {"right"}
    torch.testing.assert_close(model(z), before)
    trained(model, z)
    for path in ("left", "right"):
        change = hra_fx.effective_weight(model.get_submodule(path)) - model.get_submodule(path).hra_base
        assert (change @ x.mT).abs().max() < 1e-5
    with pytest.warns(HRAWarning, match="right"):
        hra_fx.protect(model, [y], 2)
    assert {row.path: row.moved is None for row in hra_fx.report(model)} == {"left": False, "right": True}
    change = hra_fx.effective_weight(model.left) - model.left.hra_base
    assert (change @ y.mT).abs().max() < 1e-5 < 1e-3 < change.abs().max()


def test_each_adapter_keeps_its_own_directions() -> None:
    base = llama().to(F64).eval()
    model = adapted(copy.deepcopy(base), "q_proj")
    hra_fx.add_adapter(model, "other", hra_fx.HRAConfig(r=4, target_modules=["q_proj"]))
    for name, ids in (("default", TASKS[0]), ("other", TASKS[1])):
        hra_fx.set_adapter(model, name)
        hra_fx.protect(model, [words(ids)], 8)
    for name, ids in (("default", TASKS[0]), ("other", TASKS[1])):
        hra_fx.set_adapter(model, name)
        trained(model, words(TASKS[2]))
        assert relative_error(output_of(model, words(ids)), output_of(base, words(ids))) < 1e-9
    hra_fx.unprotect(model)
    assert {row.adapter: row.moved is None for row in hra_fx.report(model)} == {"default": False, "other": True}


def test_a_protected_adapter_refuses_vectors_that_change_its_directions(tmp_path: Path) -> None:
    model, other = (adapted(llama(), "q_proj", init_weights=False) for _ in range(2))
    hra_fx.protect(model, [words(TASKS[0])], 8)
    before = copy.deepcopy(model.state_dict())
    hra_fx.save_adapter(other, tmp_path)
    with pytest.raises(AdapterError, match=r"keeps directions .* Call hra_fx\.unprotect\(model\) before"):
        hra_fx.load_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(AdapterError, match=r"keeps directions .* or saved without default_kept\. Call"):
        model.load_state_dict(other.state_dict(), strict=False)
    hra_fx.unprotect(model)
    hra_fx.load_adapter(model, tmp_path)
    torch.testing.assert_close(output_of(model, words(TASKS[1])), output_of(other, words(TASKS[1])))


def test_directions_of_another_model_are_refused() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0", "2", r=2)
    x, before = torch.randn(4, 6), copy.deepcopy(model.state_dict())
    for previous, kind, message in (
        ({"0": torch.eye(6, 1), "1": torch.eye(8, 1)}, AdapterError, r"no adapted layers of this width .*: 1\."),
        ({"0": torch.eye(6, 1), "2": torch.eye(6, 1)}, AdapterError, r"no adapted layers of this width .*: 2\."),
        ({"0": torch.eye(6, 1), "2": 1}, AdapterError, r"^`previous` must be .*: 2\."),
        (torch.eye(6, 1), AdapterError, r"^`previous` must be what protect returned, got Tensor"),
        ({"2": torch.ones(8, 1)}, AdapterError, r"^2: the columns .* must be orthonormal"),
        ({"2": torch.eye(8, 1).long()}, AdapterError, r"^2: .* floating-point, but these int64 columns are not\."),
        ({"0": torch.eye(6, 2)}, ConfigError, r"got 4 for 0 .* \(those of `previous` count too"),
    ):
        with pytest.raises(kind, match=message):
            hra_fx.protect(model, [x], 2, previous)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("again", [[0], [1, 0]])
def test_samples_that_come_again_do_not_lose_their_protection(again: list[int]) -> None:
    """In float32, where the earlier directions are rounded."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    tasks = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    before = model(tasks[0]).detach()
    model = adapted(model, target_modules="all-linear")
    kept = hra_fx.protect(model, [tasks[0]], 3)
    kept = hra_fx.protect(model, [tasks[place] for place in again], 3, kept)
    kept = hra_fx.protect(model, [tasks[0]], 3, kept)
    for basis in kept.directions.values():
        basis.zero_()  # a copy
    trained(model, torch.randn(8, 32), steps=20)
    torch.testing.assert_close(model(tasks[0]), before, atol=1e-5, rtol=1e-5)
