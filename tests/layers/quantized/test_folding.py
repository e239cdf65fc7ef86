"""Folding into quantized weights: `requantize=True`, the error that it reports, and what is refused without it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from adapting import randomise
from layers.quantized.bases import (
    FEW as ALL_FEW,
    SCHEMES,
    adapted,
    config,
    dense,
    inputs,
    packed,
    plain,
    quantized,
    rotated,
    values,
)
from oracles import relative_error
from torch import nn

import hra_fx
from hra_fx.errors import FoldError, HRAWarning

REFOLDED = [name for name, scheme in SCHEMES.items() if scheme.refolds]
FEW = [name for name in ALL_FEW if name in REFOLDED]
HINT = (
    "To avoid the quantization error, save the adapter (hra_fx.save_adapter), load it into the model before "
    "quantization (hra_fx.load_adapter), and fold that."
)
#: Attributes of the libraries' tensors that describe how a weight is quantized.
SETTINGS = (
    *("blocksize", "quant_type", "compress_statistics", "quant_storage"),
    *("block_size", "target_dtype", "act_quant_kwargs", "activation_quantization", "reduce_range"),
)


@contextmanager
def reported() -> Iterator[list[str]]:
    """The warnings of hra_fx in the block."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    assert all(issubclass(one.category, HRAWarning) for one in caught)
    texts += [str(one.message) for one in caught]


def picture(model: nn.Module) -> list[object]:
    return [(name, id(p), p._version) for name, p in model.named_parameters()] + [type(m) for m in model.modules()]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fold_and_merge_are_refused_without_requantize(scheme: str) -> None:
    model = adapted(scheme)
    before = picture(model)
    with pytest.raises(FoldError) as caught:
        hra_fx.fold(model)
    message = str(caught.value)
    assert message.startswith(f"0 (and 1 more): its weight is quantized ({SCHEMES[scheme].words}), and ")
    assert message.endswith(HINT)
    assert ("hra_fx.fold(model, requantize=True)" in message) is SCHEMES[scheme].refolds
    with pytest.raises(FoldError, match="its weight is quantized") as caught_in_merge:
        hra_fx.merge_adapter(model)
    assert ("Adapters also work without being merged." in str(caught_in_merge.value)) is SCHEMES[scheme].refolds
    assert picture(model) == before


@pytest.mark.parametrize("scheme", REFOLDED)
def test_fold_rotates_and_quantizes_again(scheme: str) -> None:
    model, x = adapted(scheme), inputs()
    expected = [rotated(model[0]).detach(), rotated(model[2]).detach()]
    before = [values(model[0]), values(model[2])]
    fresh = plain()
    for path, weight in zip((0, 2), expected, strict=True):
        fresh[path].weight.data.copy_(weight)
    fresh = quantized(scheme, fresh)
    kinds, kept = [type(layer) for layer in quantized(scheme)], vars(packed(model[0])) | {}
    plan = hra_fx.plan_fold(model, requantize=True)
    assert torch.equal(values(model[0]), before[0]), "a plan writes nothing"
    assert str(plan).count(f"requantized ({SCHEMES[scheme].words})") == 2
    with reported() as texts:
        folded = hra_fx.fold(model, requantize=True)
    assert folded is model and [type(layer) for layer in model] == kinds
    assert list(model.state_dict()) == list(quantized(scheme).state_dict())
    for name in SETTINGS:
        assert vars(packed(model[0])).get(name) == kept.get(name)
    for layer, old, new, planned in zip((model[0], model[2]), before, expected, plan.layers, strict=True):
        assert planned.quantized == SCHEMES[scheme].words
        assert planned.rounding == pytest.approx(relative_error(values(layer), new), rel=1e-3)
        assert planned.change == pytest.approx(relative_error(new, old), rel=1e-3)
        # The library quantizes the dense rotated weight to almost the same values: a tie may be rounded differently.
        assert relative_error(values(layer), values(fresh[int(planned.path)])) < 2e-3
    with torch.no_grad():
        hidden = torch.tanh(x.double() @ values(model[0]).mT + model[0].bias.double())
        wanted = hidden @ values(model[2]).mT + model[2].bias.double()
    assert relative_error(model.train()(x), wanted) < SCHEMES[scheme].tolerance
    (text,) = texts
    worst = max(plan.layers, key=lambda layer: layer.rounding)
    assert text.startswith(
        f"2 weights were quantized again, with an error of up to {worst.rounding:.1e} of their norm "
    )
    assert f"({worst.path}, {worst.quantized}; its adapter changed it by {worst.change:.1e})" in text
    assert text.endswith(HINT)


@pytest.mark.parametrize("scheme", FEW)
def test_an_adapter_that_does_not_rotate_leaves_the_weight_unchanged(scheme: str) -> None:
    """Quantizing again would change the weights of torchao.

    After the first forward, the layers of bitsandbytes have the scales only in their state, which a new weight resets.
    """
    base, x = quantized(scheme), inputs()
    for layer in base:
        layer.support_avx512bf16_for_cpu = False  # the plain layers of bitsandbytes would round to bfloat16
    model = hra_fx.transform(base, config()).eval()
    with torch.no_grad():
        expected = model(x)
        before = [packed(model[0]), packed(model[2])]
        hra_fx.fold(model, requantize=True)
        assert packed(model[0]) is before[0] and packed(model[2]) is before[1]
        assert relative_error(model(x), expected) < SCHEMES[scheme].tolerance


@pytest.mark.parametrize("scheme", ["ao int8", "ao int4"])
def test_a_change_that_is_smaller_than_the_rounding_error_is_reported(scheme: str) -> None:
    model = hra_fx.transform(quantized(scheme), config())
    with torch.no_grad():
        model[0].hra_u["default"][0, 0].add_(1e-4)
    with reported() as texts:
        hra_fx.fold(model, requantize=True)
    (text,) = texts
    assert text.startswith("1 weights were quantized again")
    assert "For 1 of them the error is at least as large as the change (0)." in text


@pytest.mark.parametrize("scheme", FEW)
def test_one_of_two_adapters_is_folded_and_the_other_stays(scheme: str) -> None:
    model, x = adapted(scheme), inputs()
    hra_fx.add_adapter(model, "other", config(r=3))
    randomise(model, seed=9)
    hra_fx.set_adapter(model, ["default", "other"])
    with pytest.raises(FoldError, match="its weight is quantized"):
        hra_fx.fold(model, "default")
    expected = rotated(model[0], "default").detach()
    with reported() as texts:
        hra_fx.fold(model, "default", requantize=True)
    assert len(texts) == 1
    assert relative_error(values(model[0]), expected) < 0.15
    assert relative_error(model(x), dense(model, x, "other")) < SCHEMES[scheme].tolerance


def test_quantized_layers_without_an_adapter_do_not_matter() -> None:
    model = nn.ModuleDict({"packed": quantized("bnb nf4"), "head": nn.Linear(32, 8)})
    hra_fx.transform(model, config("head", inference_mode=True))
    hra_fx.fold(model)
    assert type(model["head"]) is nn.Linear


@pytest.mark.parametrize("scheme", [name for name in FEW if not name.startswith("hqq")])
def test_a_shared_weight_is_untied(scheme: str) -> None:
    base = quantized(scheme, nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)))
    base[2].weight = base[0].weight
    model = hra_fx.transform(base, config("0", inference_mode=True))
    randomise(model)
    before = values(model[2])
    (planned,) = hra_fx.plan_fold(model, requantize=True).layers
    assert planned.untied == ("2.weight",)
    with reported() as texts:
        hra_fx.fold(model, requantize=True)
    assert len(texts) == 2 and texts[0].startswith("untied: 0 (from 2.weight)")
    assert torch.equal(values(model[2]), before) and model[0].weight is not model[2].weight


@pytest.mark.parametrize("scheme", FEW)
def test_vectors_that_are_not_finite_change_nothing(scheme: str) -> None:
    model = adapted(scheme)
    with torch.no_grad():
        model[2].hra_u["default"][0] = torch.nan
    before = picture(model)
    with pytest.raises(FoldError, match="2: the folded weight is not finite"):
        hra_fx.fold(model, requantize=True)
    assert picture(model) == before


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("scheme", ["bnb int8", "bnb nf4", "bnb fp4 nested"])
def test_a_pickled_model_is_folded_as_the_original(scheme: str, called: bool) -> None:
    """An unpickled parameter of bitsandbytes is a plain parameter with the same attributes."""
    model, x = adapted(scheme).eval(), inputs()
    with torch.no_grad():
        if called:
            model(x)
        again = pickle.loads(pickle.dumps(model))
        with reported():
            hra_fx.fold(model, requantize=True)
            hra_fx.fold(again, requantize=True)
        assert torch.equal(values(again[0]), values(model[0])) and torch.equal(values(again[2]), values(model[2]))
        assert torch.equal(again(x), model(x))
