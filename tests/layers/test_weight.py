"""`layer.weight`: `W Q` while the model runs, and the parameter `W` at any other time."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from adapting import config
from layers.cases import Doubling
from layers.checking import assert_same, normal, pair, run_dense, vectors_of
from layers.reading_weights import (
    Functional,
    X,
    assert_gradients,
    dense,
    functional,
    layer_pair,
    read_by_a_function,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers import RwkvConfig, RwkvForCausalLM

import hra_fx


def test_the_effective_weight_of_an_adapter_that_does_not_act() -> None:
    base, model = functional()
    assert hra_fx.effective_weight(base.read) is base.read.weight
    with hra_fx.disable_adapters(model):
        assert hra_fx.effective_weight(model.read) is model.read.weight
    hra_fx.merge_adapter(model)
    assert hra_fx.effective_weight(model.read) is model.read.weight
    for wrong in (nn.ReLU(), 3):
        with pytest.raises(hra_fx.AdapterError, match=r"must be a module with a weight, got (ReLU|int)"):
            hra_fx.effective_weight(wrong)  # type: ignore[arg-type]
    theirs: Any = peft.get_peft_model(Functional(), peft.HRAConfig(r=2, target_modules=["read"]))
    with pytest.raises(hra_fx.AdapterError, match=r"`layer` is PEFT's HRALinear\. Pass `layer\.get_base_layer\(\)`"):
        hra_fx.effective_weight(theirs.base_model.model.read)


class Watching(nn.Module):
    """Stores what it reads, and fails or calls a function in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.seen, self.act = nn.Linear(6, 6), list[Tensor](), lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.fc.weight)
        self.act()
        self.seen.append(self.fc.weight)
        return self.fc(x)


def test_a_read_is_plain_in_a_forward_and_the_parameter_after_it() -> None:
    base, model = pair(Watching, ["fc"])
    wanted = dense(base.fc, model.fc)

    def check_reads(act: Callable[[], object]) -> None:
        model.act, model.seen = act, []
        model(X)
        assert [type(weight) for weight in model.seen] == [Tensor, Tensor]
        for weight in model.seen:
            assert_same(weight, wanted)
        assert model.fc.weight is model.fc._parameters["weight"]

    def in_a_thread() -> None:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(model.fc.weight))
        thread.start(), thread.join()
        assert found[0] is model.fc._parameters["weight"]  # no model runs in that thread

    def fails() -> None:
        with pytest.raises(ZeroDivisionError):
            nested(X)

    nested = hra_fx.transform(Watching().double(), config("fc", r=2))
    nested.act = lambda: 1 / 0  # type: ignore[assignment,return-value]
    for act in (lambda: None, in_a_thread, fails):
        check_reads(act)


PARTS = ["called", "read", "both"]


class Blocks(nn.Module):
    """Blocks that read weights: in another method, called alone, and in a checkpoint."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.reentrant = nn.ModuleList([Functional() for _ in range(2)]), reentrant

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) * 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_blocks_that_run_again_in_the_backward_pass(reentrant: bool, autocast: bool) -> None:
    base, _ = pair(Blocks, PARTS)
    dtype = torch.float32 if autocast else torch.float64
    _, model = pair(lambda: Blocks(reentrant), PARTS, dtype, apply_GS=autocast)
    x = X.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (model(x) * normal(3, 3, 6)).sum().backward()
    leaves = list(vectors_of(model).values())
    wanted = torch.autograd.grad((run_dense(base, model, X) * normal(3, 3, 6)).sum(), leaves)
    for leaf, oracle in zip(leaves, wanted, strict=True):
        assert_same(leaf.grad, oracle, rtol=5e-2 if autocast else 1e-10)


@pytest.mark.parametrize("frozen", [["blocks.0"], ["read", "both"]], ids=str)
def test_blocks_that_run_again_with_frozen_vectors(frozen: list[str]) -> None:
    _, model = pair(lambda: Blocks(False), PARTS)
    _, other = pair(Blocks, PARTS)
    for each in (model, other):
        for path, vectors in vectors_of(each).items():
            vectors.requires_grad_(not any(part in path for part in frozen))
        each(X).square().sum().backward()
    wanted = vectors_of(other)
    assert 0 < sum(vectors.grad is None for vectors in wanted.values()) < len(wanted)
    for path, vectors in vectors_of(model).items():
        assert (vectors.grad is None) is (wanted[path].grad is None)
        assert vectors.grad is None or torch.equal(vectors.grad, wanted[path].grad)


class Unmarked(nn.Module):
    """The function in its checkpoint reads a weight, and no class names it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.fc, self.reentrant = nn.Linear(6, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(read_by_a_function, self.fc, x, use_reentrant=self.reentrant)
        return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_that_runs_again_in_the_backward_pass(reentrant: bool) -> None:
    base, model = pair(lambda: Unmarked(reentrant), ["fc"])
    (model(X.clone().requires_grad_()) * normal(3, 3, 4)).sum().backward()
    vectors = model.fc.hra_u["default"]
    (wanted,) = torch.autograd.grad((F.linear(X, dense(base.fc, model.fc)) * normal(3, 3, 4)).sum(), vectors)
    assert_same(vectors.grad, wanted)


def test_methods_and_parts_that_are_called_alone() -> None:
    base, model = pair(Blocks, PARTS)
    whole = run_dense(base, model, X)
    assert_same(2 * model.features(X), whole)
    folded = hra_fx.fold(copy.deepcopy(model))
    assert_same(model.blocks[1](X), folded.blocks[1](X))


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


def test_a_forward_that_another_tool_sets_on_the_model() -> None:
    """As TRL does for SFT, to compute log probabilities from the weight of the output layer."""
    base, model = functional()
    model.forward = lambda x: torch.tanh(x) @ model.read.weight.T
    wanted = torch.tanh(X) @ dense(base.read, model.read).mT
    assert_gradients(model(X), wanted, [model.read.hra_u["default"]])


def test_a_layer_with_its_own_forward_whose_weight_is_offloaded() -> None:
    _, model = pair(lambda: nn.Sequential(Doubling(6, 6), nn.Linear(6, 4)), ["0", "1"])
    wanted = model(X)
    cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        assert_same(model(X), wanted)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.hra_u.default", "1.hra_u.default"]


class Attending(nn.Module):
    fc: nn.Linear

    def attend(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def asking(use: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A module of its own class, which uses the dtype of a weight by its name, and reads its values by another name."""

    class Asking(Attending):
        read = use

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x.to(self.fc.weight.dtype))  # type: ignore[no-any-return]

    return Asking()


OTHER_NAMES: list[Callable[[Any, Tensor], Tensor]] = [
    lambda self, x: read_by_a_function(self.fc, x),
    lambda self, x: F.linear(x, getattr(self.fc, "weight")),  # noqa: B009
    lambda self, x: super(type(self), self).attend(x),
]


@pytest.mark.parametrize("use", OTHER_NAMES, ids=["a function", "getattr", "a method of the parent class"])
def test_a_weight_whose_values_are_read_by_another_name(use: Callable[[Any, Tensor], Tensor]) -> None:
    base, model = pair(lambda: nn.Sequential(asking(use)), ["fc"])
    for run in (model, model[0]):  # the model, and a part that is called alone
        assert_gradients(run(X), F.linear(X, dense(base[0].fc, model[0].fc)), [model[0].fc.hra_u["default"]])


def test_a_weight_that_was_read_is_freed_before_the_forward_ends() -> None:
    def use(self: Any, x: Tensor) -> Tensor:
        read = weakref.ref(self.fc.weight)
        assert read() is None
        return self.fc(x)  # type: ignore[no-any-return]

    _, model = pair(lambda: asking(use), ["fc"])
    for guard in (torch.enable_grad, torch.no_grad):
        with guard():
            model(X)


class Masking(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= 0.5
        return F.linear(input, self.weight)


WRITES: dict[str, Callable[[Any], object]] = {
    "entries": lambda layer: layer.weight.__setitem__((slice(None), 0), 0),
    "in place": lambda layer: torch.clamp_(layer.weight, -1, 1),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "out": lambda layer: torch.zeros(6, 6, out=layer.weight),
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 0.5)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_in_a_forward_that_would_be_lost_is_refused(write: str) -> None:
    module = asking(lambda self, x: (WRITES[write](self.fc), self.fc(x))[1])
    model = hra_fx.transform(module, config("fc", r=2))
    text = r"^fc: the forward of the model (writes|sets) .*W Q"
    with torch.no_grad(), pytest.raises(hra_fx.AdapterError, match=text):
        model(X)


def test_a_forward_that_writes_data_is_refused_by_transform() -> None:
    model = nn.ModuleDict({"fc": Masking(6, 6)})
    before = [type(part) for part in model.modules()]
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"^fc: the forward of Masking uses the `data` of a weight"):
        hra_fx.transform(model, config("fc", r=2))
    assert [type(part) for part in model.modules()] == before and not hasattr(model.fc, "hra_u")


# ---- the parameter ----


def test_the_parameter_can_be_written_replaced_and_fused() -> None:
    base, layer = layer_pair()
    with torch.no_grad():
        for one in (layer, base):
            one.weight[0] = 7.0
            one.weight.mul_(2)
    assert_same(hra_fx.effective_weight(layer), dense(base, layer))
    layer.weight, base.weight = nn.Parameter(normal(4, 4, 6)), nn.Parameter(normal(4, 4, 6))
    assert_same(layer(X), F.linear(X, dense(base, layer), base.bias))
    norm = nn.BatchNorm1d(4).double().eval()
    with torch.no_grad():
        norm.running_mean.copy_(normal(5, 4)), norm.weight.copy_(normal(6, 4))
    wanted = norm(layer(X.flatten(0, -2)))
    assert_same(torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm)(X.flatten(0, -2)), wanted)


def test_weights_that_another_tool_computes() -> None:
    _, model = functional()
    prune.l1_unstructured(model.read, "weight", 0.5)
    with pytest.raises(hra_fx.FoldError, match=r"^read: another tool computes its weight \(pruning"):
        hra_fx.fold(model)
    _, layer = layer_pair()
    with pytest.raises(
        hra_fx.AdapterError, match=r"weight_norm, pruning or similar was applied after hra_fx\.transform"
    ):
        parametrizations.weight_norm(layer)(X)
    for spoil in (
        lambda adapters: prune.l1_unstructured(adapters, "default", 0.5),
        lambda adapters: parametrize.register_parametrization(adapters, "default", nn.Identity()),
    ):
        _, model = functional()
        spoil(model.read.hra_u)
        for act in (lambda model: model(X), hra_fx.get_peft_model_state_dict):
            with pytest.raises(hra_fx.HRAError, match=r"^read: the vectors of 'default' are no longer a parameter"):
                act(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_code_that_writes_gets_the_parameter(wrapped: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 32, "context_length": 8, "rescale_every": 2}
    made: Any = RwkvForCausalLM(RwkvConfig(**sizes))
    if wrapped:
        made.rwkv = checkpoint_wrapper(made.rwkv)
    _, model = pair(lambda: made, ["output", "value"])
    folded = hra_fx.fold(copy.deepcopy(model.train()))
    for training in (True, False, True, False):  # its forward divides weights in eval mode, and multiplies them again
        one, other = (each.train(training)(torch.tensor([[3, 4, 5]]), use_cache=False) for each in (model, folded))
        assert_same(one, other)
