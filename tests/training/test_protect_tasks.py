"""`protect` with `previous`: what a model learned in earlier tasks stays, without the samples of these tasks."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import llama
from torch import Tensor, nn
from training.test_protect import CASES, F64, adapted, distance, output_of, trained, words
from transformers import Trainer, TrainingArguments

import hra_fx
from hra_fx.errors import AdapterError, ConfigError, HRAWarning
from hra_fx.integrations import HRATrainer, ProtectCallback

#: The samples of three tasks. Those of the first two have fewer independent inputs than are protected.
TASKS = [torch.tensor([ids]) for ids in ([5, 9], [7, 1], [11, 4])]


@pytest.mark.parametrize("name", ["Llama", "Gram-Schmidt", "experts", "attention"])
def test_outputs_for_the_samples_of_all_earlier_tasks_stay(name: str) -> None:
    make, _, _, fields = CASES[name]
    tasks: list[Any] = TASKS if name == "attention" else [words(ids) for ids in TASKS]
    model, kept, learned = make().to(F64).eval(), None, []
    for number, task in enumerate(tasks):
        model = hra_fx.transform(model, hra_fx.HRAConfig(**({"r": 4} | fields)))

        def prepare(optimizer: Any, model: nn.Module = model, number: int = number) -> None:
            nonlocal kept
            if number:
                kept = hra_fx.protect(optimizer, model, [tasks[number - 1]], 4, kept)

        trained(model, task, prepare=prepare)
        model = hra_fx.fold(model)
        with torch.no_grad():
            learned.append(output_of(model, task))
            for before, sample in zip(learned[:-1], tasks, strict=False):
                assert distance(output_of(model, sample), before) < 1e-8
    assert kept is not None and {basis.shape[-1] for basis in kept.values()} <= set(range(5, 9))
    assert distance(output_of(make().to(F64).eval(), tasks[2]), learned[2]) > 0.01


def kept_by(model: nn.Module, optimizer: Any, batches: Any, directions: int, **previous: Any) -> dict[str, Tensor]:
    torch.save(hra_fx.protect(optimizer, model, batches, directions, **previous), file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_earlier_directions_come_first_and_new_ones_are_the_most_of_the_rest() -> None:
    """For PEFT's layers. The oracle: singular values of the inputs without their parts in earlier directions."""
    base = llama().to(F64).eval()
    model = peft.get_peft_model(copy.deepcopy(base), peft.HRAConfig(r=2, target_modules=["q_proj", "k_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    first, second = torch.randint(0, 64, (2, 4, 16), generator=torch.Generator().manual_seed(3))
    before = kept_by(model, optimizer, [first], 6)
    after = kept_by(model, optimizer, [second], 5, previous=before)
    path = "model.layers.0.self_attn.q_proj"
    assert sorted(after) == sorted(before) and torch.equal(after[path][:, :6], before[path])
    torch.testing.assert_close(after[path].mT @ after[path], torch.eye(11, dtype=F64))
    rows: list[Tensor] = []
    base.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(lambda _, x: rows.append(x[0][0]))
    for text in second:
        base(text[None])
    rest = torch.cat(rows) @ (torch.eye(32, dtype=F64) - before[path] @ before[path].mT)
    best = torch.linalg.svdvals(rest)[5:].square().sum()
    assert (rest - rest @ after[path] @ after[path].mT).square().sum() < 1.05 * best
    again = kept_by(model, optimizer, None, 5, previous=after)
    assert all(torch.equal(again[name], basis) for name, basis in after.items())
    assert after[path] is after[path.replace("q_proj", "k_proj")]
    own, optimizer = adapted(base, "q_proj", "k_proj")
    again = hra_fx.protect(optimizer, own, None, previous=after)
    assert all(torch.equal(again[name], basis) for name, basis in after.items())


@pytest.mark.parametrize("by", ["HRATrainer", "callback"])
def test_trainers_keep_the_tasks_before(by: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.1, report_to=[], use_cpu=True, save_strategy="no"
    )
    model, protected, learned = llama().to(F64).eval(), None, []
    for number, task in enumerate(TASKS):
        model = hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=["q_proj", "down_proj"]))
        rows, before = ([{"input_ids": ids, "labels": ids} for ids in tasks] for tasks in (task, TASKS[number - 1]))
        if by == "HRATrainer":
            given = {"protect": before, "previously_protected": protected} if number else {}
            trainer: Any = HRATrainer(model, arguments, train_dataset=rows, protected_directions=4, **given)
        else:
            callback = ProtectCallback([words(TASKS[number - 1])], 4, protected)
            with pytest.raises(AdapterError, match=r"the callback does not protect any directions yet\."):
                _ = callback.protected
            trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback] if number else [])
        trainer.train()
        if number:
            protected = trainer.protected if by == "HRATrainer" else callback.protected
        model = hra_fx.fold(model).eval()
        with torch.no_grad():
            learned.append(output_of(model, words(task)))
            for was, sample in zip(learned[:-1], TASKS, strict=False):
                assert distance(output_of(model, words(sample)), was) < 1e-8
    assert protected is not None and all(basis.shape[-1] > 4 for basis in protected.values())
    assert distance(output_of(llama().to(F64).eval(), words(TASKS[2])), learned[2]) > 0.01
    rest = hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    state = trainer.optimizer.state_dict()
    unprotected = HRATrainer(rest, arguments, train_dataset=rows, pair_difference=None if by == "callback" else 0.1)
    with pytest.raises(AdapterError, match=r"the state was saved with protected directions\. Pass protect="):
        unprotected.create_optimizer().load_state_dict(state)
    trainer = HRATrainer(rest, arguments, train_dataset=rows, previously_protected=protected)
    with pytest.raises(AdapterError, match="does not protect any directions"):
        _ = trainer.protected
    trainer.create_optimizer()
    for path, basis in trainer.protected.items():
        torch.testing.assert_close(basis @ basis.mT, protected[path] @ protected[path].mT)


class Branches(nn.Module):
    """Two layers, of which a batch reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, right: bool = False) -> Tensor:
        return self.right(x) if right else self.left(x)


def test_a_layer_that_only_later_samples_reach() -> None:
    """And a second call replaces the directions, but a state has those of layers that its samples miss."""
    model, optimizer = adapted(Branches(), "left", "right")
    second = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    x = torch.randn(2, 8)
    with pytest.warns(
        HRAWarning,
        match=r"^protect: these layers get no directions from `batches`, because no batch reached .*: right\.$",
    ):
        kept = hra_fx.protect(optimizer, model, [x], 2)
    assert {path: tuple(basis.shape) for path, basis in kept.items()} == {"left": (8, 2), "right": (8, 0)}
    with pytest.warns(HRAWarning, match=r"these layers get no directions from `batches`, .*: left\."):
        kept = hra_fx.protect(optimizer, model, [(x, True)], 2, kept)
    model(x).sum().backward()
    model(x, True).sum().backward()
    optimizer.step()
    for path in ("left", "right"):
        change = hra_fx.effective_weight(model.get_submodule(path)) - model.get_submodule(path).hra_base
        assert change.abs().max() > 1e-5 > (change @ x.mT).abs().max()
    for _ in range(2):
        with pytest.warns(HRAWarning, match="right"):
            hra_fx.protect(second, model, [x], 2)
        assert second.state_dict()["hra_protected"]["right"].shape == (8, 0)
        assert {row.path: row.protected is None for row in hra_fx.report(model)} == {"left": False, "right": True}
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert torch.equal(second.state_dict()["hra_protected"]["right"], kept["right"])


def test_directions_of_another_model_are_refused() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0", "2")
    x = torch.randn(4, 6)
    before = copy.deepcopy(model.state_dict())
    for batches, previous, kind, message in (
        (None, None, AdapterError, r"`batches` is None.* or `previous`"),
        ([], {"0": torch.eye(6, 1), "2": torch.eye(8, 1)}, AdapterError, r"`batches` is empty"),
        ([x], {"0": torch.eye(6, 1), "1": torch.eye(8, 1)}, AdapterError, r"only in the model, .*: 1, 2\."),
        ([x], {"0": torch.eye(6, 1), "2": torch.eye(6, 1)}, AdapterError, r"or have another width: 2\."),
        ([x], {"0": torch.eye(6, 1), "2": 1}, AdapterError, r"^`previous` must be .* width: 2\."),
        ([x], torch.eye(6, 1), AdapterError, r"^`previous` must be what protect returned, a dictionary, got Tensor"),
        ([x], {"0": torch.eye(6, 1), "2": torch.ones(8, 1)}, AdapterError, r"^2: the columns .* must be orthonormal"),
        (
            [x],
            {"0": torch.eye(6, 1), "2": torch.eye(8, 1).long()},
            AdapterError,
            r"^2: .* floating-point, but these int64 columns are not\.",
        ),
        (
            [x],
            {"0": torch.eye(6, 2), "2": torch.eye(8, 2)},
            ConfigError,
            r"got 4 for 0\..* \(those of `previous` count too",
        ),
    ):
        with pytest.raises(kind, match=message):
            hra_fx.protect(optimizer, model, batches, 2, previous)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "hra_protected" not in optimizer.param_groups[0]


@pytest.mark.parametrize("again", [[0], [1, 0]])
def test_samples_that_come_again_do_not_lose_their_protection(again: list[int]) -> None:
    """In float32, where the earlier directions are rounded."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    tasks = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    before = model(tasks[0]).detach()
    model, optimizer = adapted(model, r=4, target_modules="all-linear", lr=0.1)
    kept = hra_fx.protect(optimizer, model, [tasks[0]], 3)
    kept = hra_fx.protect(optimizer, model, [tasks[place] for place in again], 3, kept)
    kept = hra_fx.protect(optimizer, model, [tasks[0]], 3, kept)
    for basis in kept.values():
        basis.zero_()  # a copy
    for _ in range(20):
        model(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(tasks[0]), before, atol=1e-5, rtol=1e-5)
    assert all(row.protected is not None and row.protected < 1e-5 for row in hra_fx.report(model))


def test_samples_that_are_drawn_at_random_depend_on_the_seed_of_the_user() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(16, 4)), "0")
    data, kept = torch.randn(50, 16), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, sampler=torch.utils.data.RandomSampler(data, num_samples=4))
        kept.append(hra_fx.protect(optimizer, model, loader, 2)["0"])
    torch.testing.assert_close(kept[0], kept[1])
    assert not torch.allclose(kept[0], kept[2], atol=0.1)
