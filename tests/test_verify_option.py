"""`transform(..., verify=True)`: right models pass, wrong rewrites are named, and the model is as it was."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from capture.checks import assert_equals_oracle, fresh, inputs, turn
from refusals import picture
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration
from transformers_use import tiny

import hra_fx
import hra_fx.transforming
from hra_fx.adapted import regions_of
from hra_fx.carrier.layer import LinearCarrier
from hra_fx.errors import AdapterError, HRAWarning, UnsupportedLayerError, VerificationError
from hra_fx.forms import LinearReflection
from hra_fx.verifying import check_against_folded

X = inputs(4, 6)
IMAGES = inputs(3, 3, 8, 8)
IDS = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers 6 -> 6; fx gets by only where the `if` is not taken up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x))) if float(x.detach().sum()) < 1e9 else x


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 6, 3, padding=1, stride=2),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 8, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"),
            nn.Dropout2d(0.3),
        )
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.features(x).mean(dim=(2, 3))
        return self.second(nn.functional.dropout(self.first(hidden), 0.2, self.training))


def targets(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]


def verified(model: nn.Module, example: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(model)} | fields))
    return hra_fx.transform(model, config, example_inputs=example, verify=True)


def refused(model: nn.Module, example: Any, kind: Any = VerificationError, **fields: Any) -> str:
    before, state = picture(model), torch.get_rng_state()
    with pytest.raises(kind) as caught:
        verified(model, example, **fields)
    assert picture(model) == before
    torch.set_rng_state(state)
    return str(caught.value)


def t5() -> Any:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))


TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
GOOD: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "two": (Two, X.float(), {}),
    "anchored": (Two, X.float(), {"r": 3, "apply_GS": True}),
    "no training": (Two, X.float(), {"inference_mode": True}),
    "cnn": (Cnn, IMAGES.float(), {}),
    "cnn with a trained head": (Cnn, IMAGES.float(), {"target_modules": ["first"], "modules_to_save": ["second"]}),
    "biases": (Cnn, IMAGES.float(), {"bias": "all"}),
    "bert": (tiny.bert, TOKENS, {"target_modules": "all-linear"}),
    "bert with labels": (tiny.bert, TOKENS | {"labels": torch.tensor([0, 1])}, {"target_modules": ["query", "value"]}),
    "llama": (lambda: tiny.llama(num_hidden_layers=4), TOKENS, {"target_modules": "all-linear"}),
    "tied llama": (lambda: tiny.llama(tie_word_embeddings=True), TOKENS, {"target_modules": ["q_proj", "lm_head"]}),
    "t5": (t5, {"input_ids": IDS, "labels": IDS}, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}),
    "mixtral": (mixtral, TOKENS, {"target_modules": ["q_proj", "o_proj", "lm_head"]}),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_models_pass_and_are_not_changed(name: str, dtype: torch.dtype) -> None:
    make, example, fields = GOOD[name]
    torch.manual_seed(1)
    model = make().to(dtype)
    if isinstance(example, Tensor):
        example = example.to(dtype)
    twin = copy.deepcopy(model)
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    verified(model, example, **fields)
    torch.manual_seed(0)
    plain = hra_fx.HRAConfig(**({"r": 2, "target_modules": targets(twin)} | fields))
    hra_fx.transform(twin, plain)
    expected = {name: value for name, value in twin.state_dict().items() if ".hra_u." in name}
    found = model.state_dict()
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())
    assert [part.training for part in model.modules() if "hra_fx" not in type(part).__module__][:3] == modes[:3]
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in expected} == {
        n: p.requires_grad for n, p in twin.named_parameters() if n in expected
    }
    assert all(p.grad is None for p in model.parameters())
    assert random.getstate() == state[1] and (np.random.get_state()[1] == state[2]).all()
    assert all(p.dtype == dtype for n, p in model.named_parameters() if ".hra_u." not in n)


def test_a_verified_model_equals_the_oracle() -> None:
    model = fresh(Two())
    base = copy.deepcopy(model).requires_grad_(False)
    verified(model, X)
    turn(model)
    assert_equals_oracle(model, base, X)


def test_without_an_example_there_is_nothing_to_run() -> None:
    model = Two()
    before = picture(model)
    with pytest.raises(AdapterError) as caught:
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["first"]), verify=True)
    assert str(caught.value) == (
        "verify=True: there is nothing to run. Give example_inputs, the arguments of one call."
    )
    assert picture(model) == before


class Hidden(Two):
    """Reads a weight by a way that neither a source nor the attribute shows."""

    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(super().forward(x), self.first._parameters["weight"])


def test_a_weight_that_is_read_past_its_attribute_is_named_as_the_first_look_does() -> None:
    for model in (fresh(Hidden()), fresh(Hidden()).eval()):
        message = refused(model, X, UnsupportedLayerError)
        assert message.startswith("first: the model (Hidden, in linear) reads its weight past the attribute")
    verified(fresh(Hidden()), X, target_modules=["second"])


class TurnsAway(LinearReflection):
    """A reflection that is not quite one."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.01


class Detached(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


class HalfTheGradient(LinearReflection):
    """Right in value."""

    def forward(self, input: Tensor) -> Tensor:
        right = super().forward(input)
        return (right + right.detach()) / 2


class InTrainMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.01 if self.training else 1.0)


class InEvalMode(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * (1.0 if self.training else 1.01)


class DetachedInput(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.detach())


class Crashing(LinearReflection):
    def forward(self, input: Tensor) -> Tensor:
        raise ZeroDivisionError("by design")


def wrong(monkeypatch: pytest.MonkeyPatch, kind: type[LinearReflection], only: str = "") -> None:
    """Make `transform` take another reflection, for layers whose `tag` is `only`."""
    import hra_fx.installing as installing

    def make(layer: nn.Module, *, on_weight: bool = False) -> Any:
        reflection = ours(layer, on_weight=on_weight)
        if only in getattr(layer, "tag", ""):
            reflection.__class__ = kind
        return reflection

    ours = installing.reflection_for
    monkeypatch.setattr(installing, "reflection_for", make)


class Blocks(nn.Module):
    """Two regions in a model that is none, and a layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.right(self.left(x)) if float(x.detach().sum()) < 1e9 else x
        return self.head(x)


@pytest.mark.parametrize(
    ("layer", "where"), [("left.2", "left"), ("right.0", "right"), ("right.2", "right"), ("head", "head")]
)
def test_the_first_region_or_layer_that_differs_is_named(
    monkeypatch: pytest.MonkeyPatch, layer: str, where: str
) -> None:
    model = fresh(Blocks())
    model.get_submodule(layer).tag = "this"
    wrong(monkeypatch, TurnsAway, "this")
    assert refused(model, X).startswith(f"{where}: in train mode output 0 of the rewritten model is not that")
    monkeypatch.undo()
    verified(model, X)
    assert {row.region for row in hra_fx.report(model)} == {"shared", "alone"}


def test_gradients_that_are_missing_and_graphs_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(Blocks())
    model.left[2].tag = "this"
    wrong(monkeypatch, Detached, "this")
    message = refused(model, X)
    assert message.startswith("left.0: in train mode the gradient of its vectors 'default' is missing.")
    ids = fresh(nn.Sequential(nn.Embedding(7, 6), Blocks()))
    ids[1].left[2].tag = "this"
    message = refused(ids, torch.tensor([[1, 2, 3]]))
    assert message.startswith("1.left.0: in train mode the gradient of its vectors 'default' is missing.")
    monkeypatch.undo()
    wrong(monkeypatch, Crashing, "this")
    assert refused(model, X) == (
        "the model: in train mode the rewritten one does not run, and the folded one does (ZeroDivisionError: by "
        "design). The rewrite would be wrong, and was taken back. Please report the model."
    )


class Draws(Two):
    """Draws numbers of Python, numpy and torch."""

    def forward(self, x: Tensor) -> Any:
        x = x * (1 + random.random()) + np.random.rand() + torch.rand_like(x)
        skipped = random.random() < 0.5
        return x + (0 if skipped else super().forward(nn.functional.dropout(x, 0.5)))


def test_random_numbers_of_the_forward_are_the_same_for_both() -> None:
    for _ in range(5):
        verified(fresh(Draws()), X)


class Rounded(Two):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Any:
        if x.dtype is torch.float64:
            raise TypeError("no doubles")
        return super().forward(x)


class Single(Two):
    """Multiplies by a float32 tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = [torch.eye(6)]

    def forward(self, x: Tensor) -> Any:
        return super().forward(x @ self.matrix[0])


@pytest.mark.parametrize("make", [Rounded, Single])
def test_a_model_that_does_not_run_in_float64_is_compared_in_float32(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    torch.manual_seed(0)
    verified(make(), X.float())

    model = make()
    wrong(monkeypatch, TurnsAway)
    assert "output 0 of the rewritten model is not that of the folded one" in refused(model, X.float())


class Rotary(Two):
    """A complex buffer, as frequencies of rotations are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x: Tensor) -> Any:
        turned = torch.view_as_complex(x.view(*x.shape[:-1], 3, 2)) * self.frequencies
        return super().forward(torch.view_as_real(turned).flatten(-2).to(x.dtype))


def test_a_complex_buffer() -> None:
    verified(Rotary(), X.float())


class InPlace(Two):
    """Writes into what it is given, and into its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Any:
        x.mul_(0.5)
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean), 0.1)
        return super().forward(x) + self.mean


def test_a_forward_that_writes_its_input_and_a_buffer() -> None:
    model, example = InPlace(), X.float()
    given = example.clone()
    verified(model, example)
    assert torch.equal(example, given) and not model.mean.any()


class Keeps(Two):
    """Keeps in a buffer what a layer gives, and gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(6, 6))

    def forward(self, x: Tensor) -> Any:
        self.seen[: len(x)].copy_(self.first(x).detach())
        return self.second(x)


def test_buffers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(Keeps())
    model.first.tag = "this"
    wrong(monkeypatch, TurnsAway, "this")
    message = refused(model, X)
    assert message.startswith("first: in train mode buffer seen of the rewritten model is not that of the folded one")


@dataclasses.dataclass
class Output:
    value: Tensor
    note: str = ""


class Structured(Two):
    def forward(self, x: Tensor) -> Any:
        return {"out": [Output(super().forward(x))], "label": "text", "count": 3}


class NoTensor(Two):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).argmax(-1)


def test_outputs_in_structures_and_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    verified(fresh(Structured()), X)
    with monkeypatch.context() as patch:
        wrong(patch, TurnsAway)
        assert "in train mode output 0" in refused(fresh(Structured()), X)
    assert refused(fresh(NoTensor()), X) == (
        "example_inputs: in train mode NoTensor gives no floating-point tensor for them, so there is nothing to "
        "compare. Give inputs for which it does, or leave verify out."
    )


def test_an_example_that_only_one_mode_takes() -> None:
    model = Cnn()
    model.features.append(nn.AdaptiveAvgPool2d(1)).append(nn.BatchNorm2d(8))
    message = refused(model.eval(), IMAGES[:1].float())
    assert message.startswith("example_inputs: in train mode Cnn without its reflections does not run on them (ValueE")
    assert message.endswith("Give inputs that the base model takes in both modes.")
    verified(model.eval(), IMAGES.float())
    assert not model.training and not model.features[2].training


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_whatever_the_user_is_in(monkeypatch: pytest.MonkeyPatch, context: Any) -> None:
    model = fresh(Two())
    model.first.tag = "this"
    wrong(monkeypatch, HalfTheGradient, "this")
    with context():
        message = refused(model, X)
    assert message.startswith("first: in train mode the gradient of its vectors 'default' is wrong.")
    ids = fresh(nn.Sequential(nn.Embedding(7, 6), Two()))
    ids[1].first.tag = "this"
    assert refused(ids, torch.tensor([[1, 2, 3]])) == (
        "1.first: in train mode the gradient of its vectors 'default' is wrong. The rewrite would be wrong, and was "
        "taken back. Leave the layer out with exclude_modules, and please report the model."
    )


@pytest.mark.parametrize(("kind", "mode"), [(InTrainMode, "train"), (InEvalMode, "eval")])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, kind: type[LinearReflection], mode: str, training: bool
) -> None:
    wrong(monkeypatch, kind)
    assert f"in {mode} mode output 0 of the rewritten" in refused(fresh(Two()).train(training), X)


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_that_is_not_its_forward(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """The graphs of the regions are what runs, and each of both."""

    def spoil(model: nn.Module, call: Any) -> None:
        graphs = regions_of(model)["right"]._hra_region.graphs
        graphs[training] = copy.deepcopy(graphs[training])
        output = graphs[training].find_nodes(op="output")[0]
        with graphs[training].inserting_before(output):
            output.args = (graphs[training].call_function(torch.mul, (output.args[0], 1.001)),)
        check_against_folded(model, call)

    monkeypatch.setattr(hra_fx.transforming, "check_against_folded", spoil)
    mode = "train" if training else "eval"
    assert refused(fresh(Blocks()), X).startswith(f"right: in {mode} mode output 0 of the rewritten model is not that")


def test_gradients_of_the_inputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, DetachedInput)
    one = fresh(nn.Sequential(nn.Linear(6, 6)))
    assert refused(one, X).startswith("the model: in train mode gradient of input 0 of the rewritten model is not that")


def test_frozen_models_pass_and_stay_frozen() -> None:
    model = fresh(Two()).requires_grad_(False)
    verified(model, X)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "first.hra_u.default",
        "second.hra_u.default",
    ]


def test_shared_layers() -> None:
    class Shared(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.first

    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.second.weight = self.first.weight

    verified(fresh(Shared()), X)
    verified(fresh(Tied()), X, target_modules=["first"])


def test_a_warning_of_the_fold_is_not_shown() -> None:
    """The fold of the copy unties, which is no concern of the user's yet."""
    model = tiny.llama(tie_word_embeddings=True)
    verified(model, TOKENS, target_modules=["lm_head"])
    assert model.config.tie_word_embeddings and model.lm_head.hra_base is model.model.embed_tokens.weight
    with pytest.warns(HRAWarning, match="untied: lm_head"):
        hra_fx.fold(model)


def test_the_carrier_of_a_layer_goes_with_an_error() -> None:
    model = fresh(Hidden())
    refused(model, X, UnsupportedLayerError)
    assert not any(isinstance(part, LinearCarrier) for part in model.modules())
