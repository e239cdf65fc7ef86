"""`HRAModel` beside PEFT's class: how it is called, its methods with PEFT's options, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model.many import refuses
from oracles import dense_vectors, relative_error
from peft_sides import F64, Net, by_peft, by_us, net, opened_by_peft, randomise, tokens, trained

import hra_fx

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"], "init_weights": False}
OTHERS: dict[str, Any] = {"r": 4, "target_modules": ["out"], "init_weights": False}


def test_how_it_is_made() -> None:
    base = net(F64)
    ours = hra_fx.get_peft_model(base, hra_fx.HRAConfig(**FIELDS), "mine")
    assert isinstance(ours, hra_fx.HRAModel) and ours is ours.get_base_model() is base
    assert list(ours.peft_config) == ["mine"]


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


GOOD = hra_fx.HRAConfig(**FIELDS)


@pytest.mark.parametrize("broken", [{}, None, "all-linear", {"a": GOOD}])
def test_a_broken_configuration_leaves_the_model_as_it_was(broken: Any) -> None:
    base = net(F64)
    with refuses(base, "`config` must be an hra_fx.HRAConfig or a peft.HRAConfig", hra_fx.HRAError):
        hra_fx.get_peft_model(base, broken, "a")


def test_add_adapter_and_what_a_merge_of_some_adapters_removes() -> None:
    model = hra_fx.get_peft_model(net(F64), GOOD, "a")
    before = model(tokens())
    model.add_adapter(adapter_name="b", peft_config=hra_fx.HRAConfig(**OTHERS))
    assert list(model.peft_config) == ["a", "b"] and model.active_adapters == ["a"]
    assert torch.equal(model(tokens()), before)
    assert model.body.layers[0].out.hra_u["b"].shape == (8, 2, 2)
    model.set_adapter("b")
    with pytest.warns(hra_fx.HRAWarning, match=r"^adapters \['b'\] were not active and are removed"):
        merged = model.merge_and_unload(adapter_names=["a"])
    assert type(merged) is Net and relative_error(merged(tokens()), before) < 1e-12


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
