"""Exported programs against the eager model at dense float64 weights: outputs, gradients, training, folding, files."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from adapting import randomise
from export.programs import F64, QUIET, adapted, capture, config, mixed, normal, picture, with_dense_weights
from oracles import relative_error
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.experimental import _export_forward_backward

import hra_fx
from hra_fx.export.captured import fold_captured, transform_captured

ALL = ("blocks.0", "blocks.1", "conv", "head")
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 7, dtype=F64), (3, 4, 12)),
    "linear of one row": (nn.Linear(12, 7, bias=False, dtype=F64), (3, 12)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dtype=F64), (2, 4, 9)),
    "conv1d, same": (nn.Conv1d(4, 6, 3, padding="same", dtype=F64), (2, 4, 9)),
    "conv2d, stride and padding": (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), dtype=F64), (2, 4, 7, 8)),
    "conv2d, dilation and groups": (nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False, dtype=F64), (2, 4, 7, 8)),
    "conv2d, same": (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(2, 1), dtype=F64), (2, 4, 7, 8)),
    "conv2d, reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", dtype=F64), (2, 4, 7, 8)),
    "conv3d": (nn.Conv3d(2, 4, (1, 3, 2), stride=2, padding=1, dtype=F64), (2, 2, 5, 5, 6)),
}
CASES = [
    *((kind, {"r": 3}, False) for kind in LAYERS),
    *(
        (kind, {"r": 3}, True)
        for kind in ("linear of one row", "conv1d, same", "conv2d, dilation and groups", "conv3d")
    ),
    ("linear", {"r": 2}, False),
    ("linear", {"r": 4, "apply_GS": True, "init_weights": False}, False),
    ("conv2d, same", {"r": 3, "apply_GS": True}, True),
]


@QUIET
@pytest.mark.parametrize(("kind", "fields", "early"), CASES, ids=str)
def test_output_and_gradients_are_those_of_the_dense_weight(kind: str, fields: dict[str, Any], early: bool) -> None:
    layer, shape = LAYERS[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    x = normal(1, *shape)
    settings = config("0", **fields)
    program = capture(model, x)
    program = adapted(program.run_decompositions() if early else program, settings)
    other = normal(2, shape[0] + 3, *shape[1:]).requires_grad_()
    ours = program.module()(other)
    with_dense_weights(model, program, settings)
    wanted = model(other)
    assert relative_error(ours, wanted) < 1e-12
    upstream = normal(3, *wanted.shape)
    (grad,) = torch.autograd.grad(ours, other, upstream)
    assert relative_error(grad, torch.autograd.grad(wanted, other, upstream)[0]) < 1e-12
    assert relative_error(fold_captured(program).module()(other), wanted) < 1e-12


@QUIET
def test_a_whole_program_with_a_tied_head() -> None:
    model, ids = mixed()
    settings = config(*ALL)
    program = adapted(capture(model, ids).run_decompositions(), settings)
    rotations = program.graph.find_nodes(op="call_function", target=torch.ops.hra_fx.rotate.default)
    assert len(rotations) == len(ALL)
    assert all(node.meta["nn_module_stack"] and node.meta["val"].dtype == F64 for node in rotations)
    with_dense_weights(model, program, settings)
    more = torch.cat([ids, ids.flip(0)])
    assert relative_error(program.module()(more), model(more)) < 1e-12
    assert relative_error(fold_captured(program).module()(more), model(more)) < 1e-12


def test_the_given_program_and_its_model_do_not_change() -> None:
    model, ids = mixed()
    given = capture(model, ids)
    before = picture(given)
    program = transform_captured(given, config(*ALL))
    randomise(program)
    program.module()(ids).sum().backward()
    adapted_before = picture(program)
    fold_captured(program)
    assert picture(program) == adapted_before
    assert picture(given) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_parameters_are_shared_and_frozen_and_vectors_are_parameters_of_the_signature() -> None:
    model, ids = mixed()
    given = capture(model, ids)
    program = transform_captured(given, config(*ALL, r=3), "style-2")
    for name, tensor in given.state_dict.items():
        assert program.state_dict[name].data_ptr() == tensor.data_ptr()
    names = [f"{path}.hra_u.style-2" for path in ALL]
    anchors = [f"{name}_anchor" for name in names]
    assert program.state_dict.keys() - given.state_dict.keys() == {*names, *anchors}
    assert set(names) < set(program.graph_signature.parameters)
    assert set(anchors) < set(program.graph_signature.buffers)
    module = program.module()
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == names
    assert all(parameter is program.state_dict[name] for name, parameter in module.named_parameters())


def test_the_same_seed_gives_the_vectors_of_the_eager_model() -> None:
    model, ids = mixed()
    settings = config("blocks.0", "blocks.1", "conv", apply_GS=True)
    torch.manual_seed(7)
    program = transform_captured(capture(model, ids), settings)
    torch.manual_seed(7)
    eager = hra_fx.transform(model, settings).state_dict()
    vectors = {name: tensor for name, tensor in program.state_dict.items() if ".hra_u." in name}
    assert len(vectors) == 6  # with anchors
    assert all(torch.equal(tensor, eager[name]) for name, tensor in vectors.items())


def test_a_fold_gives_the_captured_graph_node_for_node_with_its_flags_and_keys() -> None:
    model, ids = mixed()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.blocks[0].bias.requires_grad_(False)
    given = capture(model, ids)
    folded = fold_captured(adapted(given, config(*ALL)))
    assert str(folded) == str(given)
    assert str(folded.graph_signature) == str(given.graph_signature)
    assert folded.graph_module.meta.get("custom") == given.graph_module.meta.get("custom")
    assert [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in folded.state_dict.items()] == [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in given.state_dict.items()
    ]
    changed = {name for name, tensor in folded.state_dict.items() if not torch.equal(tensor, given.state_dict[name])}
    assert changed == {f"{path}.weight" for path in ALL}
    again = transform_captured(folded, config("conv"))
    assert relative_error(again.module()(ids), folded.module()(ids)) < 1e-12


@pytest.mark.parametrize("apply_GS", [False, True])
def test_a_bfloat16_program_folds_from_float64(apply_GS: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    program = adapted(capture(model, normal(1, 4, 64).bfloat16()), config("0", apply_GS=apply_GS))
    assert program.state_dict["0.hra_u.default"].dtype == torch.float32
    exact = model.double()
    with_dense_weights(exact, program, config("0", apply_GS=apply_GS))
    folded = fold_captured(program).state_dict["0.weight"]
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, exact[0].weight.bfloat16())  # type: ignore[union-attr]
    x = normal(2, 8, 64).bfloat16()
    assert relative_error(program.module()(x), exact(x.double())) < 5e-3


@QUIET
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.10
def test_a_saved_program_is_the_same_when_it_is_loaded() -> None:
    model, ids = mixed()
    settings = config(*ALL, apply_GS=True)
    program = adapted(capture(model, ids), settings)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.equal(loaded.module()(ids), program.module()(ids))
    assert transform_captured(loaded, settings) is loaded
    trainable = [name for name, parameter in loaded.module().named_parameters() if parameter.requires_grad]
    assert trainable == [f"{path}.hra_u.default" for path in ALL]
    folded = fold_captured(loaded)
    assert torch.equal(folded.module()(ids), fold_captured(program).module()(ids))
    assert all(tensor.requires_grad for tensor in folded.state_dict.values() if isinstance(tensor, nn.Parameter))


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return (self.model(ids) - 1).square().mean()


def joint_gradients(program: ExportedProgram, ids: Tensor) -> dict[str, Tensor]:
    """Name of a parameter -> its gradient, by the joint graph of forward and backward."""
    joint = _export_forward_backward(program)
    signature: Any = joint.graph_signature
    state = [joint.state_dict[spec.target] for spec in signature.input_specs if spec.target]
    with torch.no_grad():
        made = fx.Interpreter(joint.graph_module).run(*state, ids)
    names = signature.backward_signature.gradients_to_parameters
    outputs = [spec.arg.name for spec in signature.output_specs]
    return {names[output]: value for output, value in zip(outputs, made, strict=True) if output in names}


@QUIET
def test_a_joint_graph_has_the_gradients_of_what_is_trained_and_no_others() -> None:
    model, ids = mixed()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.blocks[0].bias.requires_grad_(False)
    base = torch.export.export(WithLoss(model), (ids,))
    program = transform_captured(base, config("blocks.0", "conv"))
    for each in (program, fold_captured(program), base):
        found, module = joint_gradients(hra_fx.lower(each), ids), each.module()
        module(ids).backward()
        wanted = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert found.keys() == wanted.keys()
        assert all(relative_error(found[name], wanted[name]) < 1e-9 for name in wanted)
    for function in (hra_fx.lift, lambda joint: hra_fx.transform(joint, config("conv"))):
        with pytest.raises(hra_fx.UnsupportedLayerError, match="contains a backward pass"):
            function(_export_forward_backward(base))


class Twice(nn.Module):
    """One layer under two names, called three times, and two layers with a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=F64)
        self.second = self.first
        self.left, self.right = nn.Linear(6, 6, dtype=F64), nn.Linear(6, 6, dtype=F64)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.right(self.left(self.second(self.first(self.first(x)).tanh())))
        return out


@QUIET
def test_a_layer_of_two_names_has_one_reflection_and_tied_layers_have_one_each() -> None:
    model, x = Twice(), normal(1, 2, 6)
    given = capture(model, x)
    settings = config("first", "second", "left", "right")
    program = adapted(given, settings)
    vectors = [name for name in program.state_dict if ".hra_u." in name and not name.endswith("_anchor")]
    assert vectors == [f"{path}.hra_u.default" for path in ("first", "left", "right")]
    with torch.no_grad():  # apart from each other
        program.state_dict["right.hra_u.default"].neg_().add_(1)
    output = program.module()(x)
    assert torch.equal(torch.export.unflatten(program)(x), output)
    with_dense_weights(model, program, settings)
    assert relative_error(output, model(x)) < 1e-12
    folded = fold_captured(program)
    assert relative_error(folded.module()(x), model(x)) < 1e-12
    assert folded.state_dict["first.weight"] is folded.state_dict["second.weight"]
    assert folded.state_dict["left.weight"] is not folded.state_dict["right.weight"]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        crossed: Tensor = self.attention(x, y, y)[0]
        own: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return crossed + own


@QUIET
def test_weights_that_are_read_by_another_module_or_in_parts() -> None:
    model, x, y = Attending(), normal(1, 2, 3, 8), normal(2, 2, 3, 8)
    settings = config("attention", "out_proj")
    program = adapted(capture(model, x, y), settings)
    with_dense_weights(model, program, settings)
    assert relative_error(program.module()(x, y), model(x, y)) < 1e-12
    assert relative_error(torch.export.unflatten(program)(x, y), model(x, y)) < 1e-12
    assert relative_error(fold_captured(program).module()(x, y), model(x, y)) < 1e-12


PASS = r"consists of operators, .* Pass the Exp.* hra_fx\.lift"
LOAD = r"GraphModule consists of operators, .*load_state_dict\(graph\.state_dict\(\), strict=False\)"


def test_a_module_of_operators_is_refused_and_stays_as_it_was() -> None:
    model, ids = mixed()
    plain = capture(model, ids).module()
    code, keys = plain.code, list(plain.state_dict())
    transformed = adapted(capture(model, ids), config("head")).module()
    for function, module, message in (
        (lambda module: hra_fx.transform(module, config("head")), plain, PASS),
        *((function, plain, PASS) for function in (hra_fx.fold, hra_fx.report, hra_fx.lower, hra_fx.freeze)),
        (lambda module: hra_fx.set_adapter(module, "default"), transformed, LOAD),
        *((function, transformed, LOAD) for function in (hra_fx.plan_fold, hra_fx.graphs)),
    ):
        with pytest.raises(hra_fx.AdapterError, match=message):
            function(module)
    assert (plain.code, list(plain.state_dict())) == (code, keys)
    assert all(parameter.requires_grad for parameter in plain.parameters())
