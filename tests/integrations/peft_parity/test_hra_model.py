"""`HRAModel` beside PEFT's class: how it is called, its methods with PEFT's options, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import dense_vectors, relative_error
from peft_sides import F64, Net, by_peft, by_us, net, opened_by_peft, randomise, tokens, trained

import hra_fx

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"], "init_weights": False}


@pytest.mark.parametrize(
    ("r", "apply_GS", "init_weights"),
    [(2, False, True), (8, False, True), (3, False, True), (1, False, False), (3, True, False)],
)
def test_the_same_seed_draws_pefts_vectors(r: int, apply_GS: bool, init_weights: bool) -> None:
    """The identity start of an even rank, and random starts; for Gram-Schmidt, PEFT repeats vectors.

    Pairs of the same vectors are the sum of two equal vectors, and a difference of zero.
    """
    fields = {"r": r, "apply_GS": apply_GS, "init_weights": init_weights, "target_modules": ["query", "out", "conv"]}
    drawn = []
    for make in (by_peft, by_us):
        base = net()
        torch.manual_seed(7)
        drawn.append((trained(make(base, **fields)), torch.rand(3)))
    (wanted, after_theirs), (got, after_ours) = drawn
    assert got.keys() == wanted.keys()
    for name, u in wanted.items():
        assert got[name].dtype == u.dtype
        torch.testing.assert_close(dense_vectors(got[name]).float(), u, rtol=1e-6, atol=0)
    assert torch.equal(after_ours, after_theirs)


def randomised(**fields: Any) -> Any:
    model = by_us(net(F64), **FIELDS, **fields)
    randomise(model)
    return model


def test_an_adapter_is_merged_unmerged_and_unloaded() -> None:
    model, base, x = randomised(modules_to_save=["head"], bias="hra_only"), net(F64), tokens()
    wanted = model(x)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert relative_error(model(x), wanted) < 1e-12
        model.unmerge_adapter()
        assert torch.equal(model(x), wanted)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True, progressbar=False)
    for plain, output in ((merged, wanted), (model.unload(), base(x))):
        assert type(plain) is Net and list(plain.state_dict()) == list(base.state_dict())
        assert relative_error(plain(x), output) < 1e-12


def test_from_pretrained_uses_the_given_configuration(tmp_path: Path) -> None:
    """As in PEFT: `config=` is used instead of the folder's."""
    randomised().save_pretrained(tmp_path)
    theirs, ours = (kind.HRAConfig.from_pretrained(tmp_path) for kind in (peft, hra_fx))
    theirs.apply_GS = ours.apply_GS = True
    opened = opened_by_peft(net(F64), tmp_path, config=theirs)
    model = hra_fx.HRAModel.from_pretrained(net(F64), tmp_path, config=ours)
    assert relative_error(model(tokens()), opened(tokens())) < 1e-5
