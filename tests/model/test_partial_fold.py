"""`fold(model, names)`: some adapters go into the weights, and the others stay as they were."""

from __future__ import annotations

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, three

import hra_fx


def test_a_fold_without_names_warns_of_adapters_that_are_not_active() -> None:
    plain, model = three()
    hra_fx.set_adapter(model, "b")
    x = normal(4, 6)
    wanted = oracle(plain, model, ["b"], x)
    text = r"^adapters \['a', 'c'\] were not active and are removed\. To keep them, pass the names to fold\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text) as caught:
        hra_fx.fold(model)
    assert caught[0].filename == __file__
    assert_close(model(x), wanted)
    assert type(model) is type(plain)


def test_after_the_last_fold_keys_classes_and_flags_are_those_of_the_base() -> None:
    base = net()
    for index, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = {key: parameter.requires_grad for key, parameter in base.named_parameters()}
    keys, kinds = list(base.state_dict()), [type(part) for part in base.modules()]
    _, model = adapted(
        base,
        a=config("first", modules_to_save=["head"]),
        b=config("first", "second", bias="hra_only"),
        c=config("second", modules_to_save=["norm"]),
    )
    for name in ("a", "b", "c"):
        hra_fx.fold(model, name)
    assert list(model.state_dict()) == keys
    assert [type(part) for part in model.modules()] == kinds
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == flags
    assert not any(key.startswith("_hra") for part in model.modules() for key in vars(part))


@pytest.mark.parametrize("active", ["a", "b"])
def test_copies_become_the_models_own_and_the_others_keep_theirs(active: str) -> None:
    """Also while another adapter's copies are in place."""
    saved = {"modules_to_save": ["head", "norm"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("first", **saved), c=config("second"))
    heads = {}
    for name in ("a", "b"):
        hra_fx.set_adapter(model, name)
        heads[name] = model.head.weight.detach().clone(), model.head.bias.detach().clone()
    x = normal(4, 6)
    hra_fx.set_adapter(model, active)
    hra_fx.fold(model, "a")
    assert torch.equal(model.head.weight, heads[active][0])
    for name, owner in (("b", "b"), ("c", "a"), ([], "a")):
        hra_fx.set_adapter(model, name)
        assert torch.equal(model.head.weight, heads[owner][0])
    assert not model.head.weight.requires_grad
    with hra_fx.disable_adapters(model):
        assert torch.equal(model.head.bias, heads["a"][1])
        assert not torch.equal(model(x), plain(x))
    hra_fx.delete_adapter(model, "b")
    assert not any("hra_saved" in key for key in model.state_dict())
    assert torch.equal(model.head.weight, heads["a"][0])
