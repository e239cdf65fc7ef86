"""`layer.weight` of an adapted layer: `W Q` for every reader, computed when it is used."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapting import config
from layers.checking import assert_same, dense_weights, normal, pair, rotation, run_dense, turned, vectors_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

import hra_fx
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.rotated_weight import InferenceRotatedWeight, RotatedWeight

F64 = torch.float64

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(6, 4),
    "Conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2)),
    "Conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "Conv1D": lambda: Conv1D(4, 6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
}
kinds = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
modes = pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])


def layer_pair(make: Callable[[], nn.Module] = LAYERS["Linear"], **fields: Any) -> tuple[Any, Any]:
    """A base layer, and the adapted layer over a copy of it."""
    base, model = pair(lambda: nn.ModuleDict({"layer": make(), "other": nn.Linear(2, 2)}), ["layer"], **fields)
    return base["layer"], model["layer"]


def weight_of(layer: Any) -> Any:
    return layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight


def dense(base: Any, layer: Any) -> Tensor:
    """`W Q` by explicit matrices in float64, differentiable in the vectors of `layer`."""
    return turned(base, weight_of(base).detach(), rotation(nn.ModuleDict({"layer": layer}), "layer"))


class Functional(nn.Module):
    """A layer that is called, one that is only read, and one that is both called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.both = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)
        return self.both(x) @ torch.softmax(self.both.weight, -1)


X = normal(1, 3, 6)


def functional(**fields: Any) -> tuple[Any, Any]:
    return pair(Functional, ["called", "read", "both"], **fields)


def assert_gradients(output: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """`output` and its gradients equal the oracle's."""
    assert_same(output, wanted)
    mixture = normal(3, *wanted.shape)
    for mine, oracle in zip(
        torch.autograd.grad((output * mixture).sum(), leaves),
        torch.autograd.grad((wanted * mixture).sum(), leaves),
        strict=True,
    ):
        assert float(oracle.abs().max()) > 1e-6
        assert_same(mine, oracle)


# ---- values ----


@kinds
@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3}, {"r": 2, "apply_GS": True}], ids=["even", "odd", "GS"])
def test_the_value_is_the_dense_product(make: Callable[[], nn.Module], fields: dict[str, Any]) -> None:
    base, layer = layer_pair(make, **fields)
    wanted, plain = dense(base, layer), weight_of(base)
    with torch.no_grad():
        assert type(weight_of(layer)) is InferenceRotatedWeight
        assert_same(weight_of(layer).clone(), wanted)
    assert type(weight_of(layer)) is RotatedWeight
    assert_gradients(weight_of(layer) * 2, wanted * 2, [layer.hra_u["default"]])
    assert torch.equal(layer.hra_base, plain)
    assert float((wanted - plain).detach().abs().max()) > 1e-3
    for same in (weight_of(layer).clone(), weight_of(layer).detach().clone(), weight_of(layer).data + 0):
        assert type(same) is Tensor
        assert_same(same, wanted)


@kinds
def test_metadata_does_not_compute_the_value(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    base, layer = layer_pair(make)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("W Q was computed")

    monkeypatch.setattr(Reflection, "forward", fail)
    monkeypatch.setattr("hra_fx.layers.adapters.rotated_weight", fail)
    plain = weight_of(base)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            weight = weight_of(layer)
            for name in ("shape", "dtype", "device", "layout", "ndim", "is_cpu", "is_cuda", "is_meta", "is_sparse"):
                assert getattr(weight, name) == getattr(plain, name), name
            for name in ("is_quantized", "itemsize", "nbytes", "is_leaf", "grad"):
                assert getattr(weight, name) == getattr(plain, name), name
            for name in ("dim", "size", "stride", "numel", "__len__", "nelement", "element_size", "is_floating_point"):
                assert getattr(weight, name)() == getattr(plain, name)(), name
            assert not weight.is_complex() and weight.is_contiguous() and weight.get_device() == -1
            assert weight.size(0) == plain.shape[0]
            assert weight.data_ptr() == layer.hra_base.data_ptr()
            assert weight.requires_grad is layer.hra_base.requires_grad is False
            assert repr(weight) == f"RotatedWeight({', '.join(map(str, plain.shape))})"
            assert weight.detach().shape == weight.data.shape == plain.shape
    with pytest.raises(AssertionError, match="W Q was computed"):
        weight_of(layer).sum()


def test_the_dtype_of_a_narrow_weight_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        base, layer = layer_pair(dtype=dtype)
        assert layer.weight.dtype == layer.weight.clone().dtype == dtype
        # One rounding of W Q, which is computed in float32.
        assert_same(layer.weight.clone(), dense(base, layer), rtol=torch.finfo(dtype).eps)


def test_numpy_and_lists() -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach()
    with pytest.raises(RuntimeError, match="requires grad"):
        layer.weight.numpy()
    assert_same(torch.from_numpy(layer.weight.detach().numpy()), wanted)
    with torch.no_grad():
        assert_same(torch.from_numpy(layer.weight.numpy()), wanted)
        assert_same(torch.from_numpy(np.asarray(layer.weight)), wanted)
        assert_same(torch.tensor(layer.weight.tolist(), dtype=F64), wanted)
    assert_same(torch.stack([*layer.weight]), wanted)
    assert layer.weight[1, 2].item() == pytest.approx(float(wanted[1, 2]), abs=1e-12)


@pytest.mark.parametrize("way", ["disabled", "strength 0", "merged", "folded"])
def test_a_weight_that_no_adapter_rotates_is_the_parameter_itself(way: str) -> None:
    base, model = functional()
    parameter = model.read._parameters["weight"]
    if way == "disabled":
        with hra_fx.disable_adapters(model):
            assert model.read.weight is parameter is model.read.hra_base
        assert type(model.read.weight) is RotatedWeight
        return
    wanted = parameter if way == "strength 0" else dense_weights(base, model)["read.weight"].detach().clone()
    if way == "strength 0":
        hra_fx.set_scale(model, "default", 0.0)
    else:
        (hra_fx.merge_adapter if way == "merged" else hra_fx.fold)(model)
    assert model.read.weight is parameter is dict(model.named_parameters())["read.weight"]
    assert_same(parameter, wanted)


# ---- gradients ----


def test_functional_reads_pass_gradients_to_every_adapter() -> None:
    base, model = functional()
    hra_fx.add_adapter(model, "other", config("read", "both", r=2, apply_GS=True))
    hra_fx.set_adapter(model, ["default", "other"])
    with torch.no_grad():
        for vectors in vectors_of(model, "other").values():
            vectors.copy_(normal(5, *vectors.shape))
    leaves = [*vectors_of(model).values(), *vectors_of(model, "other").values()]
    assert len(leaves) == 5
    assert_gradients(model(X), run_dense(base, model, X, adapters=("default", "other")), leaves)


def test_a_base_weight_that_is_trained_gets_its_gradient() -> None:
    base, layer = layer_pair()
    layer.weight.requires_grad_(True)
    plain = weight_of(base).detach().requires_grad_()
    wanted = turned(base, plain, rotation(nn.ModuleDict({"layer": layer}), "layer"))
    (F.linear(X, layer.weight) * normal(2, 3, 4)).sum().backward()
    (F.linear(X, wanted) * normal(2, 3, 4)).sum().backward()
    assert_same(layer.hra_base.grad, plain.grad)


@modes
def test_requires_grad_and_grad_are_those_of_the_base_weight(grad: bool) -> None:
    _, layer = layer_pair()
    parameter = layer._parameters["weight"]
    with torch.set_grad_enabled(grad):
        weight = layer.weight
        assert weight.requires_grad_() is weight
        assert parameter.requires_grad and layer.weight.requires_grad
        layer.weight.requires_grad_(False)
        assert not parameter.requires_grad and not layer.weight.requires_grad
        layer.weight.requires_grad = True
        assert parameter.requires_grad
        assert not layer.weight.detach().requires_grad and layer.weight.detach().grad is None
        assert layer.weight.grad is None
        parameter.grad = torch.ones_like(parameter)
        assert layer.weight.grad is parameter.grad
        layer.weight.grad = None
        assert parameter.grad is None


def test_a_weight_read_without_gradients_is_not_used_with_them() -> None:
    base, layer = layer_pair()
    with torch.no_grad():
        weight = layer.weight
    with pytest.raises(hra_fx.AdapterError, match=r"where autograd does not see it.*Call it under torch\.no_grad\(\)"):
        F.linear(X, weight)
    with torch.no_grad():
        assert_same(F.linear(X, weight), X @ dense(base, layer).mT)
    layer.hra_u.requires_grad_(False)
    assert_same(F.linear(X, weight), X @ dense(base, layer).mT)


# ---- writes ----


def assign_data(w: Any) -> None:
    w.data = torch.zeros_like(w)


def assign_item(w: Any) -> None:
    w[0] = 0


def add_assign(w: Any) -> None:
    w += 1


def multiply_assign(w: Any) -> None:
    w *= 2


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros(4, 6)),
    "data.copy_": lambda w: w.data.copy_(torch.zeros(4, 6)),
    "data.fill_": lambda w: w.data.fill_(0),
    "detach().mul_": lambda w: w.detach().mul_(2),
    "data =": assign_data,
    "w[0] =": assign_item,
    "+=": add_assign,
    "*=": multiply_assign,
    "out=": lambda w: torch.add(torch.ones(4, 6, dtype=F64), 1, out=w),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.kaiming_uniform_": lambda w: nn.init.kaiming_uniform_(w),
    "relu, inplace": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_add_([w], 1),
    "apply_": lambda w: w.apply_(abs),
    "share_memory_": lambda w: w.share_memory_(),
}


@modes
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_refused(write: Callable[[Any], Any], grad: bool) -> None:
    base, layer = layer_pair()
    with torch.set_grad_enabled(grad):
        with pytest.raises(hra_fx.AdapterError) as caught:
            write(layer.weight)
        assert "writes into the weight of an adapted layer, which is computed as W Q" in str(caught.value)
        assert "Write to `layer.hra_base`, or call hra_fx.fold(model) first." in str(caught.value)
        assert torch.equal(layer.hra_base, base.weight)
        assert_same(layer.weight.clone(), dense(base, layer))


def test_writes_into_the_base_weight_are_seen() -> None:
    base, layer = layer_pair()
    with torch.no_grad():
        for one in (layer.hra_base, base.weight):
            one[0] = 7.0
            one.mul_(2)
    assert_same(layer.weight.clone(), dense(base, layer))
    layer.weight = nn.Parameter(normal(4, 4, 6))  # replaces the parameter, as for any layer
    base.weight = nn.Parameter(normal(4, 4, 6))
    assert layer.hra_base is layer._parameters["weight"]
    assert_same(layer(X), F.linear(X, dense(base, layer), base.bias))


@modes
def test_a_rotated_weight_does_not_become_a_parameter(grad: bool) -> None:
    base, layer = layer_pair()
    with torch.set_grad_enabled(grad):
        for weight in (layer.weight, layer.weight.data):
            with pytest.raises(hra_fx.AdapterError, match=r"layer\.weight\.detach\(\)\.clone\(\)"):
                nn.Parameter(weight)
        assert_same(nn.Parameter(layer.weight.detach().clone()), dense(base, layer))


REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], object]] = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "random pruning": lambda layer: prune.random_structured(layer, "weight", 0.5, dim=0),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
}


@modes
@pytest.mark.parametrize("act", REPARAMETRIZATIONS.values(), ids=REPARAMETRIZATIONS)
def test_reparametrizing_an_adapted_layer_is_refused(act: Callable[[nn.Module], object], grad: bool) -> None:
    _, layer = layer_pair()
    with torch.set_grad_enabled(grad), pytest.raises(hra_fx.AdapterError):
        act(layer)


def test_pruning_is_refused_before_it_changes_the_layer() -> None:
    base, layer = layer_pair()
    with pytest.raises(hra_fx.AdapterError, match=r"before hra_fx\.transform, or call hra_fx\.fold\(model\) first"):
        prune.l1_unstructured(layer, "weight", 0.5)
    assert list(layer._parameters) == list(base._parameters) and not layer._buffers
    assert_same(layer(X), F.linear(X, dense(base, layer), base.bias))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("act", [weight_norm, spectral_norm])
def test_the_older_norms_fail_at_the_latest_when_the_layer_is_called(act: Callable[[nn.Module], Any]) -> None:
    _, layer = layer_pair()
    with pytest.raises(
        hra_fx.AdapterError, match=r"since weight_norm, pruning or the like came after hra_fx\.transform"
    ):
        act(layer)(X)


# ---- copies, files, dtypes ----


@modes
def test_copies_of_a_weight(grad: bool) -> None:
    base, layer = layer_pair()
    wanted = dense(base, layer).detach().clone()
    with torch.set_grad_enabled(grad):
        twin = copy.deepcopy(layer.weight)
        file = io.BytesIO()
        torch.save(layer.weight.detach(), file)
        file.seek(0)
        loaded, unpickled = torch.load(file, weights_only=True), pickle.loads(pickle.dumps(layer.weight.detach()))
        with torch.no_grad():
            layer.hra_base.zero_()
        assert type(loaded) is type(unpickled) is Tensor
        for same in (twin.clone(), loaded, unpickled):
            assert_same(same, wanted)


def test_copies_of_a_model() -> None:
    base, model = functional()
    wanted = run_dense(base, model, X).detach()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(twin.read.weight) is RotatedWeight and twin.read.weight.data_ptr() != model.read.weight.data_ptr()
        assert_same(twin(X), wanted)
        with torch.no_grad():
            twin.read.hra_u["default"].normal_()
        assert_same(twin(X), run_dense(base, twin, X))
        assert_same(model(X), wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_states_hold_the_base_weight(assign: bool) -> None:
    base, model = functional()
    state = model.state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value) and type(state[name]) is Tensor
    assert {name for name, _ in model.named_parameters()} == {name for name in state if not name.endswith("_anchor")}
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    _, other = functional(init_weights=True)
    moved = {name: value * 1.5 for name, value in state.items()}
    other.load_state_dict(moved, assign=assign)
    scaled = copy.deepcopy(base)
    scaled.load_state_dict({name: value * 1.5 for name, value in base.state_dict().items()})
    assert_same(other(X), run_dense(scaled, other, X))
    assert type(other.read.weight) is RotatedWeight


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 4e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
def test_a_model_moves_to_another_dtype(dtype: torch.dtype, rtol: float) -> None:
    base, model = functional()
    wanted = run_dense(base, model, X)
    model.to(dtype)
    assert model.read.weight.dtype == model.read.hra_base.dtype == dtype
    assert_same(model(X.to(dtype)), wanted, rtol=rtol)
    assert model.double().read.weight.dtype == F64
    assert torch.equal(model.read.weight.clone(), model.read.hra_u(weight=model.read._parameters["weight"]))


def test_a_model_moves_to_the_meta_device_and_back() -> None:
    base, model = functional()
    state = model.state_dict()
    model.to("meta")
    assert model.read.weight.is_meta and model.read.weight.sum().is_meta
    model.load_state_dict(state, assign=True)
    assert_same(model(X), run_dense(base, model, X))


# ---- tied weights ----


class Tied(nn.Module):
    """An output layer whose weight is the embedding's; `read` computes it functionally."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.body(self.embed(ids)))
        return F.linear(x, self.head.weight) if self.read else self.head(x)


@pytest.mark.parametrize("read", [False, True])
def test_an_adapted_head_that_is_tied_to_the_embedding(read: bool) -> None:
    """The head is rotated, the embedding is not, and there is one parameter."""
    torch.manual_seed(0)
    base = Tied(read=read).double()
    model = hra_fx.transform(copy.deepcopy(base), config("head", "body", r=3))
    with torch.no_grad():
        for vectors in vectors_of(model).values():
            vectors.copy_(normal(4, *vectors.shape))
    assert model.head.hra_base is model.embed.weight is model.head._parameters["weight"]
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert type(model.head.weight) is RotatedWeight
    ids, weights = torch.arange(9), dense_weights(base, model)
    hidden = torch.tanh(F.linear(base.embed(ids), weights["body.weight"], base.body.bias))
    assert_gradients(model(ids), hidden @ weights["head.weight"].mT, list(vectors_of(model).values()))
    assert len([*model.parameters()]) == len([*base.parameters()]) + 2


# ---- compilers, tracers, transformations ----


@pytest.mark.slow
def test_torch_compile_of_functional_reads() -> None:
    base, model = functional()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_gradients(compiled(X), run_dense(base, model, X), list(vectors_of(model).values()))
    with torch.no_grad():
        assert_same(compiled(X), run_dense(base, model, X))


def test_one_graph_of_torch_compile() -> None:
    base, model = functional()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_gradients(compiled(X), run_dense(base, model, X), list(vectors_of(model).values()))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_of_functional_reads(strict: bool) -> None:
    base, model = functional()
    program = torch.export.export(model, (X,), strict=strict).module()
    assert_same(program(X), run_dense(base, model, X))
    names = {name for name, _ in program.named_parameters()}
    assert {"read.weight", "read.hra_u.default"} <= names


def test_functional_call_and_vmap() -> None:
    base, model = functional()
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = run_dense(base, model, X)

    def run(vectors: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state | {"read.hra_u.default": vectors}, (x,))

    vectors = model.read.hra_u["default"]
    assert_same(run(vectors.detach(), X), wanted)
    gradient = torch.func.grad(lambda u: (run(u, X) * normal(3, 3, 6)).sum())(vectors.detach())
    (oracle,) = torch.autograd.grad((wanted * normal(3, 3, 6)).sum(), vectors)
    assert_same(gradient, oracle)
    # A batch of adapters over one input, and one adapter over a batch of inputs.
    batch = torch.stack([vectors.detach(), normal(6, *vectors.shape)])
    for u, output in zip(batch, torch.vmap(run, (0, None))(batch, X), strict=True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.read.hra_u["default"].copy_(u)
        assert_same(output, run_dense(base, other, X))
    assert_same(torch.vmap(run, (None, 0))(vectors.detach(), X), wanted)


def test_a_replica_of_data_parallel_has_its_tensors_as_plain_attributes() -> None:
    base, model = functional()
    moved: Any = copy.deepcopy(base)
    with torch.no_grad():
        moved.read.weight.mul_(1.5)
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        twin = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            twin._parameters.pop(key, None)
            setattr(twin, key, parameter * 1.5 if (name, key) == ("read", "weight") else parameter.view_as(parameter))
        replica._modules[name] = twin
    assert_gradients(replica(X), run_dense(moved, model, X), list(vectors_of(model).values()))


# ---- optimizers ----


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_hold_parameters_and_train_the_base_weight_too(foreach: bool) -> None:
    base, model = functional(r=2)
    model.requires_grad_()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, foreach=foreach)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(type(parameter) is nn.Parameter for parameter in held)
    assert {id(parameter) for parameter in held} == {id(layer.hra_base) for layer in model.children()} | {
        id(p) for name, p in model.named_parameters() if not name.endswith("weight")
    }
    losses = []
    for _ in range(5):
        loss = (model(X) - 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained, state = copy.deepcopy(base), model.state_dict()
    trained.load_state_dict({name: state[name] for name in base.state_dict()})
    assert not torch.equal(trained.read.weight, base.read.weight)
    assert_same(model(X), run_dense(trained, model, X))


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_over_a_rotated_weight_does_not_lose_its_step(foreach: bool) -> None:
    _, layer = layer_pair()
    layer.weight.requires_grad_()
    optimizer = torch.optim.SGD([layer.weight], lr=0.1, foreach=foreach)
    layer(X).sum().backward()
    with pytest.raises(hra_fx.AdapterError, match="writes into the weight of an adapted layer"):
        optimizer.step()
