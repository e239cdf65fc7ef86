"""Values, rounding and memory layout of folded weights; weights that share memory; refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from model.many import (
    F64,
    adapted,
    assert_close,
    config,
    ids,
    llama,
    normal,
    refuses,
    run,
    turn,
    weights,
)
from oracles import dense_weight, layer_q, relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx import fold
from hra_fx.errors import FoldError

LAYERS: dict[str, Callable[..., tuple[Any, tuple[int, ...]]]] = {
    "linear": lambda dtype: (nn.Linear(40, 24, dtype=dtype), (5, 40)),
    "conv": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, dtype=dtype), (2, 4, 6, 7)),
    "oblong": lambda dtype: (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), groups=2, dtype=dtype), (2, 4, 8, 9)),
    "depthwise": lambda dtype: (nn.Conv2d(4, 4, 3, groups=4, dilation=2, dtype=dtype), (2, 4, 8, 9)),
    "circular": lambda dtype: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", dtype=dtype), (2, 4, 6, 7)),
}


def adapt(model: Any, *paths: str, **fields: Any) -> Any:
    """`model` itself, with reflections at random vectors."""
    return adapted(model, a=config(*paths, **{"r": 3} | fields))[1]


def oracle_weight(layer: Any) -> Tensor:
    """`W Q` in float64 of an adapted layer."""
    return dense_weight(layer.weight.detach(), layer_q(layer, ["a"]).detach())


def memory(tensor: Tensor) -> tuple[Any, ...]:
    return id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    r=st.integers(1, 8),
    apply_GS=st.booleans(),
    init_weights=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, F64]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_are_the_nearest_to_the_exact_ones_and_in_the_same_memory(
    kind: str, r: int, apply_GS: bool, init_weights: bool, dtype: torch.dtype
) -> None:
    base, shape = LAYERS[kind](dtype)
    assume(not apply_GS or r <= base.weight[0].numel())
    bias, before = base.bias.detach().clone(), memory(base.weight)
    model = adapt(nn.Sequential(base), "0", r=r, apply_GS=apply_GS, init_weights=init_weights)
    x = normal(*shape).to(dtype)
    wanted, weight = model(x).detach(), oracle_weight(model[0])
    fold(model)
    assert model[0] is base
    assert memory(base.weight) == before
    assert torch.equal(base.bias, bias)
    if dtype == F64:
        assert relative_error(model(x), wanted) < 1e-9
        assert relative_error(base.weight, weight) < 1e-12
    else:
        assert torch.equal(base.weight, weight.to(dtype))


def channels_last() -> nn.Sequential:
    layer = nn.Conv2d(4, 6, 3, dtype=F64)
    return nn.Sequential(layer.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def halves_of_one_buffer() -> nn.Sequential:
    """As in optimizers with flat parameters: one storage, but no common element, so the weights are not tied."""
    flat = normal(48)
    model: Any = nn.Sequential(nn.Linear(6, 4, dtype=F64), nn.Linear(4, 6, dtype=F64))
    model[0].weight, model[1].weight = (nn.Parameter(flat[:24].view(4, 6)), nn.Parameter(flat[24:].view(6, 4)))
    return model


@pytest.mark.parametrize("make", [channels_last, halves_of_one_buffer])
def test_weights_of_any_layout_keep_it(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    before = [memory(layer.weight) for layer in model]
    model = adapt(model, *map(str, range(len(model))))
    wanted = [oracle_weight(layer) for layer in model]
    fold(model)
    assert [memory(layer.weight) for layer in model] == before
    assert all(relative_error(layer.weight, weight) < 1e-12 for layer, weight in zip(model, wanted, strict=True))


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
)
def test_fold_is_exact_in_any_context(context: Callable[[], Any]) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 4, dtype=F64)), "0")
    wanted = oracle_weight(model[0])
    with context():
        fold(model)
    assert relative_error(model[0].weight, wanted) < 1e-12
    assert model[0].weight.requires_grad
    assert model[0].weight.grad_fn is None


# Refusals


def spoil_vectors(layer: Any) -> None:
    layer.hra_u["a"][1, 1] = float("nan")


def spoil_weight(layer: Any) -> None:
    layer.weight[0, 0] = float("nan")


def overflow(layer: Any) -> None:
    """Float16 weights of 65,000; `W Q` rotates (1, 1, 1, 1) onto one axis, where it is twice as long."""
    layer.to(torch.float16).weight.fill_(65000.0)
    layer.hra_u["a"].zero_()[:4, 0] = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    layer.weight[:, 4:] = 0


def depend(layer: Any) -> None:
    layer.hra_u["a"][:, 2] = layer.hra_u["a"][:, 0]


@pytest.mark.parametrize(
    ("spoil", "apply_GS", "text"),
    [
        (spoil_vectors, False, "not finite"),
        (spoil_vectors, True, "not finite|dependent"),
        (spoil_weight, False, "not finite"),
        (overflow, False, "not finite"),
        (depend, True, "dependent"),
    ],
)
def test_a_layer_that_cannot_be_folded_is_named_and_no_other_one_is_folded(
    spoil: Callable[[Any], None], apply_GS: bool, text: str
) -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "0", "2", apply_GS=apply_GS)
    with torch.no_grad():
        spoil(model[2])
    with refuses(model, f"^2: .*({text})", FoldError):
        fold(model)


# ---- weights that share memory: a fold unties the layer, and the others do not change ----


class Tied(nn.Module):
    """An embedding, a body, and a head whose weight is that of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))  # type: ignore[no-any-return]


TOKENS = torch.arange(9)
UNTIED = "untied: {}. Each now has its own weight, so a saved model is larger."


def folds(model: nn.Module, untied: str, names: str | None = None) -> None:
    """Fold, and compare the whole message of the one warning."""
    with pytest.warns(hra_fx.HRAWarning) as caught:
        hra_fx.fold(model, names)
    assert [str(warning.message) for warning in caught] == [UNTIED.format(untied)]


def test_a_tied_head_stays_tied_if_the_folded_adapter_does_not_have_it() -> None:
    plain, model = adapted(Tied(), a=config("body"), b=config("head"))
    wanted = weights(plain, model, ["a"])["body.weight"]
    hra_fx.fold(model, "a")
    assert_close(model.body.weight, wanted, 1e-12)
    assert model.head.weight is model.embed.weight
    assert list(model.head.hra_u) == ["b"]


def test_one_of_two_adapters_of_a_tied_head_is_folded_and_the_other_still_acts() -> None:
    plain, model = adapted(Tied(), a=config("head", r=3), b=config("head"))
    hra_fx.set_adapter(model, ["a", "b"])
    output, wanted = model(TOKENS).detach(), weights(plain, model, ["a"])["head.weight"]
    folds(model, "head (from embed.weight)", "a")
    assert_close(model.head.weight, wanted, 1e-12)
    assert not model.head.weight.requires_grad
    assert_close(model(TOKENS), output, 1e-12)
    assert torch.equal(model.embed.weight, plain.embed.weight)
    hra_fx.fold(model)
    assert_close(model(TOKENS), output, 1e-12)
    assert model.head.weight.requires_grad


def one_parameter() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[1].weight = model[0].weight
    return model


def a_view() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double()
    model[1].weight = nn.Parameter(model[0].weight.detach()[1:5])
    return model


def a_buffer() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Linear(6, 4)).double()
    model[0].register_buffer("mirror", model[0].weight.detach())
    return model


def one_kernel() -> nn.Sequential:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).double().to(memory_format=torch.channels_last)
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "paths", "untied"),
    [
        (one_parameter, ["0", "1"], "0 (from 1.weight), 1 (from 0.weight)"),
        (one_parameter, ["1"], "1 (from 0.weight)"),
        (a_view, ["1"], "1 (from 0.weight)"),
        (a_buffer, ["0"], "0 (from 0.mirror)"),
        (one_kernel, ["0"], "0 (from 1.weight)"),
    ],
)
def test_tensors_over_one_memory_are_separated(make: Callable[[], nn.Module], paths: list[str], untied: str) -> None:
    base = make()
    plain, model = adapted(base, a=config(*paths))
    wanted = dict(plain.state_dict()) | weights(plain, model, ["a"])
    strides = [model.get_parameter(f"{path}.weight").stride() for path in paths]
    folds(model, untied)
    for name, value in model.state_dict().items():
        if name in (f"{path}.weight" for path in paths):
            assert_close(value, wanted[name], 1e-12)
            assert value.untyped_storage().nbytes() == value.nbytes
        else:
            assert torch.equal(value, wanted[name])
    assert [model.get_parameter(f"{path}.weight").stride() for path in paths] == strides


def test_an_untied_weight_of_a_layer_with_two_paths_can_be_trained() -> None:
    base: Any = Tied()
    base.again = base.head
    model = adapted(base, a=config("head"))[1]
    with torch.inference_mode():
        folds(model, "head (from embed.weight)")
    assert model.again is model.head
    assert model.head.weight is not model.embed.weight
    model(TOKENS).sum().backward()
    assert model.head.weight.grad is not None


def test_a_fold_that_fails_and_a_merge_leave_all_tied() -> None:
    model = adapted(Tied(), a=config("head", "body"))[1]
    text = (
        "head.weight: it shares memory with embed.weight, which merging in place would change too. Untie it first "
        "(layer.weight = torch.nn.Parameter(layer.weight.detach().clone()) and config.tie_word_embeddings = False), or "
        "call hra_fx.fold, which unties it."
    )
    with refuses(model, f"^{re.escape(text)}$", hra_fx.FoldError):
        hra_fx.merge_adapter(model)
    with torch.no_grad():
        model.body.hra_u["a"].fill_(float("nan"))
    with refuses(model, "not finite", hra_fx.FoldError):
        hra_fx.fold(model)
    assert model.head.weight is model.embed.weight


def test_a_reflected_head_and_a_trained_copy_of_its_embedding() -> None:
    plain, model = adapted(Tied(), a=config("head", modules_to_save=["embed"]))
    trained, output = model.embed.weight.detach().clone(), model(TOKENS).detach()
    wanted = weights(plain, model, ["a"])["head.weight"]
    assert not torch.equal(trained, plain.embed.weight)
    hra_fx.fold(model)
    assert torch.equal(model.embed.weight, trained)
    assert_close(model.head.weight, wanted, 1e-12)
    assert_close(model(TOKENS), output, 1e-12)


# ---- a trained copy of an output layer whose weight is tied to the embedding: untied while the copy exists ----


def tied() -> nn.Module:
    model = llama(tie_word_embeddings=True)
    assert is_tied(model)
    return model


def is_tied(model: nn.Module) -> bool:
    """Whether the weights are one parameter; the configuration must agree."""
    one = model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is one
    return one


def test_the_trained_copy_survives_tie_weights_and_the_embedding_stays() -> None:
    model = tied()
    embedding = model.model.embed_tokens.weight.detach().clone()
    hra_fx.transform(model, config("q_proj", modules_to_save=["lm_head"]))
    turn(model)
    wanted, before = run(model, ids()), model.lm_head.weight.detach().clone()
    assert not torch.equal(before, embedding)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(run(model, ids()), wanted)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.model.embed_tokens.weight.requires_grad
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, ids()), run(tied(), ids()))
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_fold_leaves_them_untied_with_their_flags_and_warns(name: str) -> None:
    model = hra_fx.transform(tied(), config("q_proj", modules_to_save=[name]))
    turn(model)
    embedding, wanted = model.model.embed_tokens.weight.detach().clone(), run(model, ids()).detach()
    text = r"^the embeddings remain untied because one of them was trained; config\.tie_word_embeddings is now False\.$"
    with pytest.warns(hra_fx.HRAWarning, match=text):
        hra_fx.fold(model)
    assert not is_tied(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.allclose(run(model, ids()), wanted, rtol=1e-9, atol=1e-9)
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
