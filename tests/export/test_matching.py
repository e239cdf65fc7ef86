"""Which layers of a captured graph are adapted, which are refused with which message, and the operator that does it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from adapting import randomise
from export.programs import F64, QUIET, adapted, capture, config, mixed, normal, picture, with_dense_weights
from oracles import dense_q, relative_error
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import GPT2Config, GPT2LMHeadModel

import hra_fx
from hra_fx.export.captured import fold_captured, transform_captured
from hra_fx.export.program import ROTATE


def refused(program: ExportedProgram, settings: hra_fx.HRAConfig, kind: type[Exception], name: str = "default") -> str:
    before = picture(program)
    with pytest.raises(kind) as caught:
        transform_captured(program, settings, name)
    assert picture(program) == before
    return str(caught.value)


class Forms(nn.Module):
    """One weight, multiplied in the way that is asked for."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.inner = nn.Linear(5, 5, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        w = self.inner.weight
        out: Tensor = {
            "mm": lambda: torch.mm(x, w),
            "addmm": lambda: torch.addmm(self.inner.bias, x, w),
            "twice transposed": lambda: torch.mm(x, w.t().permute(1, 0)),
            "from the left": lambda: torch.mm(w, x.t()).t(),
            "blocks of outputs": lambda: torch.cat([x @ part.t() for part in w.split([2, 3])], 1),
            "cast": lambda: nn.functional.linear(x.float(), w.float()).double(),
        }[self.form]()
        return out


FORMS = {
    "mm": True,
    "addmm": True,
    "twice transposed": True,
    "from the left": False,
    "blocks of outputs": False,
    "cast": False,
}


@QUIET
@pytest.mark.parametrize(
    ("form", "transposed", "early"),
    [
        *((form, transposed, False) for form, transposed in FORMS.items()),
        ("cast", False, True),  # the only one with a linear, which becomes other operators
    ],
)
def test_a_product_is_rotated_on_the_side_of_its_inputs(form: str, transposed: bool, early: bool) -> None:
    model, x = Forms(form), normal(1, 4, 5)
    settings = config("inner")
    captured = capture(model, x)
    program = adapted(captured.run_decompositions() if early else captured, settings)
    if transposed:
        with_dense_weights(model, program, settings, lambda weight, q: q.mT @ weight)
    else:
        with_dense_weights(model, program, settings)
    bound = 1e-6 if form == "cast" else 1e-12
    assert relative_error(program.module()(x), model(x)) < bound
    assert relative_error(fold_captured(program).module()(x), model(x)) < bound


def test_a_model_of_transformers_has_the_layers_that_peft_gives_it() -> None:
    settings = hra_fx.HRAConfig(r=2)
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, attn_implementation="eager")).eval()
    ids = torch.arange(4)[None]
    given = torch.export.export(model, (ids,))
    program = transform_captured(given, settings)
    wanted = hra_fx.transform(model, settings).state_dict().keys()
    assert {name for name in program.state_dict if ".hra_u." in name} == {name for name in wanted if ".hra_u." in name}
    assert program.state_dict["transformer.h.0.attn.c_attn.hra_u.default"].shape == (8, 2)
    randomise(program)
    assert relative_error(fold_captured(program).module()(ids).logits, program.module()(ids).logits) < 1e-5


@pytest.mark.filterwarnings("ignore:.*the entry 'weight' matches no module:hra_fx.HRAWarning")
def test_names_indices_and_expressions_choose_as_they_do_of_a_model() -> None:
    model, ids = mixed()
    program = capture(model, ids)
    for settings in (
        hra_fx.HRAConfig(target_modules="all-linear"),
        hra_fx.HRAConfig(target_modules=r"blocks\.\d"),
        config("0", "1", "conv", exclude_modules=["blocks.1"]),
        config("weight", "head", "blocks.0"),
    ):
        chosen = {name.partition(".hra_u.")[0] for name in transform_captured(program, settings).state_dict}
        assert {path for path in chosen if ".weight" not in path and ".bias" not in path} - {"shift"} == set(
            hra_fx.selection.select.select(model, settings)
        )


def test_a_child_may_have_the_name_of_an_attribute_of_graphs() -> None:
    model = nn.Sequential()
    for name in ("graph", "code", "linear"):
        model.add_module(name, nn.Linear(3, 3, dtype=F64))
    program = adapted(capture(model, torch.randn(2, 3, dtype=F64)), config("graph", "linear"))
    assert [row.path for row in hra_fx.report(program).rows] == ["graph", "linear"]


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["head"]}], ids=str)
def test_only_reflections_can_be_trained(fields: dict[str, Any]) -> None:
    model, ids = mixed()
    message = refused(capture(model, ids), config("conv", **fields), hra_fx.ConfigError)
    assert message.startswith(f"{next(iter(fields))}=")
    assert "only reflections can be trained in a captured graph" in message


class Odd(nn.Module):
    """Weights that not only their layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.penalised = nn.Linear(4, 4)
        self.both = nn.Linear(4, 4)
        self.up = nn.ConvTranspose1d(4, 4, 1)
        self.guarded = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.detached = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.penalised(self.emb(ids)) + self.penalised.weight.norm()
        hidden = self.both(hidden) + hidden @ self.both.weight
        hidden = self.up(hidden.transpose(1, 2)).transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.guarded(hidden)
        hidden = nn.functional.linear(hidden.float(), self.detached.weight.detach())
        return nn.functional.linear(hidden, self.emb.weight)


@pytest.fixture(scope="module")
def odd() -> ExportedProgram:
    return torch.export.export(Odd(), (torch.zeros(2, 3, dtype=torch.long),))


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (
            "emb",
            "emb: its weight is also used by aten.embedding.default (node 'embedding' in emb), which would get the",
        ),
        ("penalised", "penalised: its weight is also used by aten.linalg_vector_norm.default"),
        (
            "both",
            "both: its weight is used as `(out, d)` by aten.linear.default (node 'linear_1' in both), and transposed",
        ),
        (
            "up",
            "up: in this graph its weight is used by aten.conv_transpose1d.default (node 'conv_transpose1d'); expect",
        ),
        (
            "guarded",
            "guarded: in this graph its weight is used in a block that torch.export captures as a separate graph (wrap",
        ),
        ("unused", "unused: in this graph its weight is not used"),
        ("detached", "detached: in this graph its weight is used by aten.detach"),
    ],
)
def test_a_weight_with_other_uses_is_refused_by_name(target: str, wanted: str, odd: ExportedProgram) -> None:
    message = refused(odd, config(target), hra_fx.UnsupportedLayerError)
    assert message.startswith(wanted)
    assert "exclude_modules" in message


def test_all_linear_misses_no_layer_silently(odd: ExportedProgram) -> None:
    settings = hra_fx.HRAConfig(target_modules="all-linear", exclude_modules=["guarded"])
    assert refused(odd, settings, hra_fx.UnsupportedLayerError).startswith("penalised: ")


def test_the_same_call_again_changes_nothing_and_another_is_refused() -> None:
    model, ids = mixed()
    given, settings = capture(model, ids), config("conv", "head")
    with pytest.raises(hra_fx.AdapterError, match=r"the graph has no reflections\. Transform it first"):
        fold_captured(given)
    program = transform_captured(given, settings)
    assert transform_captured(program, config("head", "conv")) is program
    for other, name in ((config("conv"), "default"), (settings, "second")):
        message = refused(program, other, hra_fx.AdapterError, name)
        assert message.startswith(f"adapter {name!r}: the graph already has another adapter or configuration, and a")
    assert "`adapter_name` must be a string" in refused(program, settings, hra_fx.AdapterError, "a.b")


@pytest.mark.parametrize(
    ("apply_GS", "value", "wanted"),
    [(False, float("nan"), "folded weight is not finite"), (True, 1.0, "vectors are linearly dependent")],
)
def test_a_fold_that_would_write_noise_is_refused(apply_GS: bool, value: float, wanted: str) -> None:
    model, ids = mixed()
    program = transform_captured(capture(model, ids), config("conv", "head", apply_GS=apply_GS))
    with torch.no_grad():
        program.state_dict["conv.hra_u.default"].fill_(value)
    before = picture(program)
    with pytest.raises(hra_fx.FoldError, match=rf"^conv\.weight: the {wanted}"):
        fold_captured(program)
    assert picture(program) == before


# ---- the operator ----

CASES = list(itertools.product([False, True], [False, True], [False, True]))


def arguments(anchored: bool, columns: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = normal(0, 7, 5) if columns else normal(0, 5, 7)
    return weight.requires_grad_(), normal(1, 7, 3).requires_grad_(), normal(2, 7, 2) if anchored else None


def dense(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    q = dense_q(vectors, apply_GS=apply_GS, anchor=anchor)
    return q.mT @ weight.double() if columns else (weight.double().flatten(1) @ q).view(weight.shape)


@pytest.mark.parametrize(("anchored", "apply_GS", "columns"), CASES)
def test_it_is_the_dense_product_with_two_derivatives(anchored: bool, apply_GS: bool, columns: bool) -> None:
    weight, vectors, anchor = arguments(anchored, columns)
    made = ROTATE(weight, vectors, anchor, apply_GS, columns)
    wanted = dense(weight, vectors, anchor, apply_GS, columns)
    assert made.is_contiguous()
    assert relative_error(made, wanted) < 1e-14
    derivatives = []
    for value in (made, wanted):
        upstream = value.mul(normal(3, *weight.shape)).sin().sum()
        first = torch.autograd.grad(upstream, (weight, vectors), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (weight, vectors))
        derivatives.append((*first, *second))
    for ours, theirs in zip(*derivatives, strict=True):
        assert relative_error(ours, theirs) < 1e-10


# torch reads the gradient of a copy, and hides its warning only where warnings are not errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_finds_the_operator_well_defined() -> None:
    """Schema, fake kernel, autograd registration, and the joint graph of torch.compile."""
    torch.library.opcheck(ROTATE, (*arguments(anchored=False, columns=True), False, True))
