"""`export_training_step`: the gradients of the program are those of the model, for other sizes too; errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import adapted, randomise
from layers.checking import assert_same
from packaging.version import Version
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrizations
from tracing.captured import CASES
from tracing.models import Straight

import hra_fx
from hra_fx.errors import AdapterError

X, LABELS = torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 0])
BATCH, LENGTH = Dim("batch", min=2, max=8), Dim("length", min=3, max=16)


def mlp(**fields: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    return adapted(model.double().eval(), "0", "2", **{"r": 4, **fields})


def step_of(model: nn.Module, **options: Any) -> ExportedProgram:
    return hra_fx.export_training_step(model, X, loss=F.cross_entropy, labels=LABELS, **options)


def check_same(program: ExportedProgram, model: nn.Module, values: tuple[Tensor, ...], loss: Tensor) -> None:
    """The program returns the loss, and the gradients of all parameters that have one."""
    found, by_name = program.module()(*values)
    assert_same(found, loss)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert by_name.keys() == trained.keys()
    wanted = torch.autograd.grad(loss, list(trained.values()))
    # Together: some are zero but for rounding, such as that of the bias of an attention's keys.
    assert_same(flat([by_name[name] for name in trained]), flat(wanted))


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def logits_loss(outputs: Any) -> Tensor:
    """A loss in float64; those of transformers are in float32."""
    values: dict[str, Tensor] = outputs if type(outputs) is dict else {"logits": outputs.logits}
    return torch.stack([value.logsumexp(-1).sum() for value in values.values()]).sum()


@pytest.mark.parametrize(("name", "traced"), [pytest.param("llama", False, marks=pytest.mark.slow), ("images", True)])
def test_gradients_at_another_size_are_those_of_the_model(name: str, traced: bool) -> None:
    if name == "llama" and Version(torch.__version__) < Version("2.13"):
        pytest.xfail("torch guards the length of attention")
    case = CASES[name]
    example, other = (without_labels(case.call(batch, length)) for batch, length in ((2, 5), (3, 7)))
    model = case.make().double().eval()
    options = {"trace": True, "example_inputs": example} if traced else {}
    adapted_model = hra_fx.transform(model, hra_fx.HRAConfig(**{"r": 4, **case.fields}), **options)
    randomise(adapted_model)
    shapes = {key: {0: BATCH, 1: LENGTH} if value.dim() == 2 else {0: BATCH} for key, value in example.items()}
    program = hra_fx.export_training_step(adapted_model, example, loss=logits_loss, dynamic_shapes=shapes)
    check_same(program, adapted_model, tuple(other.values()), logits_loss(adapted_model(**other)))


def without_labels(call: dict[str, Any]) -> dict[str, Any]:
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in call.items()}
    return {name: value for name, value in doubled.items() if name != "labels"}


@pytest.mark.parametrize("fields", [{"apply_GS": True, "bias": "all"}, {"r": 1, "modules_to_save": ["2"]}], ids=str)
def test_what_a_configuration_trains_has_gradients(fields: dict[str, Any]) -> None:
    targets = ["0"] if "modules_to_save" in fields else ["0", "2"]
    model = mlp(**fields, target_modules=targets)
    check_same(step_of(model), model, (X, LABELS), F.cross_entropy(model(X), LABELS))


def test_several_adapters_and_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 3))
    adapted(model.double(), "0", "3", r=4)
    hra_fx.add_adapter(model, "second", hra_fx.HRAConfig(r=3, target_modules=["3", "4"]))
    hra_fx.set_adapter(model, ["default", "second"])
    randomise(model)
    model.train()
    x, labels = torch.randn(4, 3, 6, 6).double(), torch.tensor([0, 1, 2, 0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    program = hra_fx.export_training_step(model, x, loss=F.cross_entropy, labels=labels)
    assert_same(dict(model.named_buffers()), before)
    eager = copy.deepcopy(model)  # the program changes the statistics of the model
    check_same(program, eager, (x, labels), F.cross_entropy(eager(x), labels))
    hra_fx.set_adapter(model, "second")
    program = hra_fx.export_training_step(model, x, loss=F.cross_entropy, labels=labels)
    assert set(program.module()(x, labels)[1]) == {"3.hra_u.second", "4.hra_u.second"}


def test_a_program_has_the_names_of_the_model_goes_through_a_file_and_leaves_the_model_unchanged() -> None:
    model = mlp()
    keys, attributes = list(model.state_dict()), set(vars(model))
    program = step_of(model, dynamic_shapes={"input": {0: BATCH}, "labels": {0: BATCH}})
    assert list(program.graph_signature.user_inputs) == ["input", "labels"]
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue()))
    check_same(loaded, model, (X, LABELS), F.cross_entropy(model(X), LABELS))


def test_dropout_is_a_part_of_a_step_in_train_mode() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double(), "0", r=4).train()
    module = step_of(model).module()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = module(X, LABELS)[0]
        torch.manual_seed(3)
        assert_same(found, F.cross_entropy(model(X), LABELS))
    assert len({float(module(X, LABELS)[0].detach()) for _ in range(3)}) == 3


def test_constants_and_unread_parameters() -> None:
    model = CASES["bert"].make().double().eval()
    adapted(model.eval(), "query", "dense", r=4, layers_to_transform=[0], modules_to_save=["pooler"])
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.randint(0, 16, (2, 5))
    call = {"input_ids": ids, "attention_mask": None, "output_hidden_states": True}
    dynamic = {0: BATCH, 1: LENGTH} if Version(torch.__version__) >= Version("2.13") else {0: BATCH}
    shapes = {"input_ids": dynamic}

    def loss_of(outputs: Any) -> Tensor:  # without the pooler
        loss: Tensor = outputs.hidden_states[-1].square().sum()
        return loss

    program = hra_fx.export_training_step(model, call, loss=loss_of, dynamic_shapes=shapes)
    assert list(program.graph_signature.user_inputs) == ["input_ids"]
    assert not any("pooler" in name for name in program.module()(ids)[1])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    ids = torch.randint(0, 16, (4, 7 if 1 in dynamic else 5))
    found, by_name = program.module()(ids)
    assert_same(found, loss_of(model(input_ids=ids, output_hidden_states=True)))
    assert by_name


def test_buffers_stay_those_of_the_model() -> None:
    class Counting(nn.Module):
        """Its forward writes into one buffer, and makes a new tensor of another."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = parametrizations.spectral_norm(nn.Linear(6, 6))
            self.layer = nn.Linear(6, 4)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            out: Tensor = self.layer(self.inner(x) + self.mean)
            return out

    model = adapted(Counting().double(), "layer", r=4)
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    program = step_of(model)
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1])
    eager = copy.deepcopy(model)
    check_same(program, eager, (X, LABELS), F.cross_entropy(eager(X), LABELS))


def test_wrong_gradients_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).double()
    model[1].register_forward_pre_hook(lambda module, args: (Straight.apply(args[0]),))
    adapted(model.eval(), "0", "1", r=4)
    with pytest.raises(AdapterError, match=r"gradient of 0\.hra_u\.default in the program differs from PyTorch's"):
        step_of(model)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(AdapterError, match="The model has no active adapter"):
        step_of(nn.Linear(6, 4).double().requires_grad_(False))
    with pytest.raises(AdapterError, match="pass `labels` for `loss`, or in `example_inputs`"):
        hra_fx.export_training_step(mlp(), X, labels=LABELS)
    with pytest.raises(AdapterError, match=r"must be a tensor with one value, got a tensor of shape \(5, 4\)"):
        hra_fx.export_training_step(mlp(), X)
    with pytest.raises(AdapterError, match="the loss in the program differs from PyTorch's by nan"):
        hra_fx.export_training_step(mlp(), X, loss=F.cross_entropy, labels=torch.full_like(LABELS, -100))
    merged = mlp()
    hra_fx.merge_adapter(merged)
    with pytest.raises(AdapterError, match=r"does not depend on any trained parameter.*or they are merged"):
        step_of(merged)
    with pytest.raises(AdapterError, match="dynamic_shapes"):
        step_of(mlp(), dynamic_shapes={"x": {0: BATCH}})
    with pytest.raises(AdapterError, match=r"`model` is an ExportedProgram\. Adapt the model"):
        step_of(torch.export.export(nn.Linear(6, 4).double(), (X,)))  # type: ignore[arg-type]
    branching = nn.Linear(6, 4).double()
    branching.register_forward_pre_hook(lambda module, args: args if args[0].sum() > 0 else None)
    with pytest.raises(AdapterError, match=r"torch.export fails at test_training_step.py, line \d+, `branching"):
        step_of(adapted(nn.Sequential(branching).eval(), "0", r=4))
