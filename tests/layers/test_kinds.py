"""Modules with weights to rotate: attention, subclasses with their own forward, models that read weights.

One test compares outputs, gradients and the fold of every case with dense products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from adapting import config, refused
from layers.cases import CASES, Case, marked
from layers.checking import assert_same, check, check_fold, dense_weights, normal, pair, run_dense
from layers.reading_weights import TARGETS, USES, Reading
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.falcon.modeling_falcon import FalconLinear

import hra_fx


class Attending(nn.Module):
    """Self-attention, or attention to another sequence. `out_proj` is never called; q, k and v are one parameter."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, **kwargs)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None, **kwargs: Any) -> Any:
        k = x if k is None else k
        return self.attn(x, k, k if v is None else v, **kwargs)


class Twice(nn.Linear):
    """Two arguments, and the weight read twice."""

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        return input @ self.weight.t() + torch.tanh(other @ self.weight.t() + self.bias)


class Feeding(nn.Module):
    """Calls a layer with one or two arguments. It can be traced."""

    def __init__(self, layer: nn.Module, count: int = 1) -> None:
        super().__init__()
        self.before, self.layer, self.count = nn.Linear(6, 6), layer, count

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return torch.tanh(self.layer(x) if self.count == 1 else self.layer(x, 2 * x))


class Demodulated(nn.Conv2d):
    """Does not only multiply with the rows of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        norm = self.weight.flatten(1).pow(2).sum(1).add(1).rsqrt().view(-1, 1, 1, 1)
        cross = self.weight.sum((0, 1), keepdim=True).tanh()
        return F.conv2d(input, self.weight * norm + cross, self.bias, self.stride, self.padding)


def encoder(**kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs.get("norm_first"))


X, MEMORY = normal(1, 5, 2, 12), normal(2, 7, 2, 12)
ROWS, SEQUENCES = normal(1, 5, 6), normal(6, 2, 5, 12)
IMAGES = normal(2, 2, 3, 8, 8)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
EVERY = ("self_attn", "out_proj", "linear1", "linear2")


def attention(x: Tensor = X, *, targets: tuple[str, ...] = ("attn", "out_proj"), call: Any = None, **made: Any) -> Case:
    return Case(lambda: Attending(**made), targets, {"x": x, **(call or {})})


def linear(make: Callable[[], nn.Module], count: int = 1) -> Case:
    return Case(lambda: Feeding(make(), count), ("layer", "before"), ROWS, fields={"apply_GS": True})


def conv(make: Callable[[], nn.Module]) -> Case:
    return Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.ReLU()), ("0", "1"), IMAGES, fields={"r": 2})


KINDS: dict[str, Case] = {
    "attention": attention(),
    "attention to another sequence": attention(call={"k": MEMORY}),
    "padding, batch first": attention(
        X.transpose(0, 1).contiguous(), call={"key_padding_mask": PADDED}, batch_first=True
    ),
    "dropout": attention(call={"need_weights": False}, dropout=0.3),
    "encoder, norm first": Case(lambda: encoder(norm_first=True), EVERY, SEQUENCES),
    "encoder and decoder": Case(
        lambda: nn.Transformer(12, 2, 1, 1, 16),
        (*EVERY, "multihead_attn"),
        {"src": normal(7, 3, 3, 12), "tgt": normal(8, 3, 3, 12)},
    ),
    "FalconLinear": linear(lambda: FalconLinear(6, 4)),
    "two arguments": linear(lambda: Twice(6, 4), 2),
    "StdConv2d of a group": conv(lambda: StdConv2d(4, 6, 3, padding=1, groups=2)),
    "Conv2dSame, dilated": conv(lambda: Conv2dSame(4, 6, (3, 2), dilation=2, bias=False)),
    "demodulated": conv(lambda: Demodulated(4, 6, 3, padding=1)),
    **{
        f"{use}, {'un' * branches}traceable": Case(
            partial(Reading, use, branches), TARGETS, ROWS, fields={"apply_GS": branches}
        )
        for use in USES
        for branches in (False, True)
    },
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("case", [*map(marked, CASES), *(pytest.param(case, id=id) for id, case in KINDS.items())])
def test_outputs_gradients_and_folded_weights_are_those_of_the_dense_product(case: Case) -> None:
    base, model = case.pair()
    args, kwargs = case.call
    check(base, model, *args, rtol=1e-9, **kwargs)
    parameters = {name: id(p) for name, p in model.named_parameters() if ".hra_u." not in name}
    for name, before in base.named_modules():
        part = model.get_submodule(name)
        assert isinstance(part, type(before)) and str(type(part)) == str(type(before))
    if isinstance(model, Reading) and not model.branches:
        assert_same(hra_fx.graphs(model)[""](*args), case.dense(base, model))
    check_fold(base, model, *args, rtol=1e-9, **kwargs)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("targets", [*([each] for each in EVERY), [*EVERY]], ids=[*EVERY, "every"])
def test_the_fast_path_over_nested_tensors(targets: list[str]) -> None:
    """It is taken in eval mode without gradients."""
    base, model = pair(encoder, targets)
    check(base, model, SEQUENCES)
    with torch.no_grad():
        slow = run_dense(base, model, SEQUENCES, src_key_padding_mask=PADDED)
        fast = model(SEQUENCES, src_key_padding_mask=PADDED)
    assert_same(fast[~PADDED], slow[~PADDED])
    model.requires_grad_(False)
    assert_same(model(SEQUENCES, src_key_padding_mask=PADDED)[~PADDED], slow[~PADDED])


# ---- attention: what is refused, and its bias ----


def test_inputs_of_different_widths_are_refused_for_the_attention() -> None:
    message = refused(nn.Sequential(nn.MultiheadAttention(12, 3, kdim=5, vdim=7)), config("0"))
    assert message.startswith("0 (MultiheadAttention): it has no `in_proj_weight`")


@pytest.mark.parametrize("first", ["reflected", "saved"])
def test_an_attention_is_not_reflected_by_one_adapter_and_saved_by_another(first: str) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "other": nn.Linear(6, 2)})
    adapters = {"reflected": config("attention", r=2), "saved": config("other", r=2, modules_to_save=["attention"])}
    hra_fx.transform(model, adapters.pop(first), "one")
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"^attention"):
        hra_fx.add_adapter(model, "two", adapters.popitem()[1])


def test_the_bias_of_an_attention_is_trained_too() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "other": nn.Linear(6, 2)})
    hra_fx.transform(model, config("attention", r=2, bias="hra_only"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["attention.in_proj_bias", "attention.hra_u.default"]


# ---- parts of models, and classes ----


def test_a_slice_of_an_adapted_sequential_runs_its_adapted_layers() -> None:
    base, model = pair(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), ["0", "2"])
    whole = model(ROWS)
    first, last = model[:2], model[2:]
    assert_same(first(ROWS), torch.relu(F.linear(ROWS, dense_weights(base, model)["0.weight"], base[0].bias)))
    assert_same(last(first(ROWS)), whole)
    assert first[0] is model[0] and torch.equal(model(ROWS), whole)
