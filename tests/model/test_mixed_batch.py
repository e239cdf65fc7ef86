"""`mixed_batch`: each row of a batch computes what it does alone, with its adapter active."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from adapting import randomise
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError

F64 = torch.float64


class Net(nn.Module):
    """Convolutions of several kinds, then linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(6, 4, (3, 1), groups=2, padding="same", dilation=2, padding_mode="circular")
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.one = nn.Linear(4, 8)
        self.two = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x)))).flatten(2)
        x = torch.tanh(self.one(self.line(x).mT))
        return self.two(x)


EVERY = ["conv", "grouped", "line", "one", "two"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "even": {"r": 4},
    "odd": {"r": 3, "target_modules": ["conv", "one"]},
    "orthonormal": {"r": 2, "apply_GS": True},
    "wide": {"r": 6, "target_modules": ["two", "grouped"], "init_weights": False},
    "weak": {"r": 2, "rank_pattern": {"two": 4}},
    "off": {"r": 2},
}


def config(**fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"target_modules": EVERY, **fields})


def net(dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(0)
    model: Any = Net().to(dtype)
    for place, (name, fields) in enumerate(ADAPTERS.items()):
        if place:
            hra_fx.add_adapter(model, name, config(**fields))
        else:
            hra_fx.transform(model, config(**fields), name)
    randomise(model)
    hra_fx.set_scale(model, "weak", 0.4)
    hra_fx.set_scale(model, "off", 0)
    return model.eval()


def inputs(rows: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(rows, 4, 8, 7, dtype=dtype, generator=torch.Generator().manual_seed(rows))


def alone(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """Each row by itself, with its adapter active."""
    before = hra_fx.report(model) and model._hra_record.active
    outputs = []
    for row, name in zip(x.split(1), names, strict=True):
        hra_fx.set_adapter(model, [] if name == "__base__" else name, inference_mode=True)
        outputs.append(model(row))
    hra_fx.set_adapter(model, before)
    return torch.cat(outputs)


NAMES: list[list[str]] = [
    [*ADAPTERS, "__base__"],
    ["odd", "__base__", "odd", "even", "orthonormal", "__base__", "weak"],
    ["__base__", "off"],
    ["wide"] * 3,
    ["odd"],
]


@pytest.mark.parametrize("names", NAMES, ids=len)
@pytest.mark.parametrize("grad", [False, True])
def test_rows_compute_what_they_do_alone(names: list[str], grad: bool) -> None:
    model, x = net(), inputs(len(names))
    wanted = alone(model, x, names)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with hra_fx.mixed_batch(model, names):
            mixed = model(x)
        torch.testing.assert_close(mixed, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(x, adapter_names=tuple(names)), wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(model(x), before)


def test_parts_of_a_model_in_a_block() -> None:
    """Layers outside of their model's forward make their own factors."""
    model, names = net(), ["even", "__base__", "odd"]
    x = torch.randn(3, 5, 4, dtype=F64)
    wanted = torch.cat([model.one(row) for row in x.split(1)])
    hra_fx.set_adapter(model, "odd")
    wanted[2] = model.one(x[2:])[0]
    with hra_fx.disable_adapters(model):
        wanted[1] = model.one(x[1:2])[0]
    with hra_fx.mixed_batch(model, names):
        torch.testing.assert_close(model.one(x), wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_inputs_and_vectors() -> None:
    model, names = net(), ["even", "odd", "even"]
    vectors = [box[name] for box in (model.conv.hra_u, model.one.hra_u) for name in ("even", "odd")]
    hra_fx.set_adapter(model, ["even", "odd"])
    x = inputs(3).requires_grad_()
    ours = torch.autograd.grad(model(x, adapter_names=names).square().sum(), [x, *vectors])
    total = torch.zeros((), dtype=F64)
    for row, name in zip(x.split(1), names, strict=True):
        hra_fx.set_adapter(model, name)  # which freezes the others
        for tensor in vectors:
            tensor.requires_grad_()
        total = total + model(row).square().sum()
    theirs = torch.autograd.grad(total, [x, *vectors])
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model, names = net(torch.float32), ["even", "odd", "__base__", "odd"]
    x = inputs(4, torch.float32)
    wanted = alone(model, x, names)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
        mixed = model(x, adapter_names=names)
    assert mixed.dtype is dtype
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(mixed.float(), wanted, rtol=tolerance, atol=tolerance)


def test_disabled_adapters_are_the_base_model() -> None:
    model, x = net(), inputs(2)
    with hra_fx.disable_adapters(model):
        wanted = model(x)
        torch.testing.assert_close(model(x, adapter_names=["even", "odd"]), wanted, rtol=1e-9, atol=1e-9)
    with hra_fx.mixed_batch(model, ["even", "odd"]), hra_fx.disable_adapters(model):
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_threads_have_batches_of_their_own() -> None:
    model, x = net(), inputs(2)
    lists = [["even", "odd"], ["odd", "weak"], ["__base__", "wide"]]
    wanted = [alone(model, x, names) for names in lists]
    inside = threading.Barrier(3)
    found: dict[int, Tensor] = {}

    def run(place: int) -> None:
        with torch.no_grad(), hra_fx.mixed_batch(model, lists[place]):
            inside.wait()
            found[place] = model(x)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, expected in enumerate(wanted):
        torch.testing.assert_close(found[place], expected, rtol=1e-9, atol=1e-9)


def test_blocks_in_blocks_and_after_an_error() -> None:
    model, x = net(), inputs(2)
    plain = model(x)
    outer = alone(model, x, ["even", "odd"])
    with hra_fx.mixed_batch(model, ["even", "odd"]):
        with pytest.raises(ZeroDivisionError), hra_fx.mixed_batch(model, ["odd", "odd"]):
            1 / 0  # noqa: B018
        torch.testing.assert_close(model(x), outer, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(x), plain)


class Reading(nn.Module):
    """Reads the weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.one.weight.dtype is x.dtype
        return nn.functional.linear(x, self.one.weight) + self.two(x)


def test_a_weight_that_is_read() -> None:
    model: Any = hra_fx.transform(Reading(), hra_fx.HRAConfig(target_modules=["one"]), "a").eval()
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(target_modules=["two"]))
    x = torch.ones(2, 4)
    text = r"^one: adapters \['a'\] are on this layer, but its weight is read"
    for guard in (torch.no_grad, torch.enable_grad):
        with guard(), pytest.raises(AdapterError, match=text):
            model(x, adapter_names=["a", "b"])
    found = model(x, adapter_names=["b", "b"])
    hra_fx.set_adapter(model, "b")
    torch.testing.assert_close(found, model(x))


def refused(model: Any, names: Any, x: Tensor | None = None) -> str:
    with pytest.raises(AdapterError) as error:
        model(inputs(2) if x is None else x, adapter_names=names)
    return str(error.value)


def test_names_that_do_not_fit() -> None:
    model = net()
    assert refused(model, ["even", "evn"]).startswith("the model has no adapter 'evn'. It has 'even', 'odd', ")
    wrong = "adapter_names must be a list with one name per row of the batch, got "
    for given in ("even", [], [1, 2]):
        assert refused(model, given) == f"{wrong}{given!r}."
    text = (
        "conv: adapter_names has 3 names, so the first dimension of the layer's input must be 3, got an input of shape "
        "(2, 4, 8, 7). Pass one name per row of the batch. "
    )
    assert refused(model, ["even"] * 3).startswith(text)
    with hra_fx.mixed_batch(model, ["even"] * 4), pytest.raises(AdapterError, match=r"^one: .* got an input of shape"):
        model.one(torch.ones(4, dtype=F64))
    with hra_fx.mixed_batch(model, ["even"] * 4), pytest.raises(AdapterError, match=r"^conv: .* \(4, 8, 7\)"):
        model.conv(inputs(1)[0])


def test_models_that_cannot() -> None:
    text = "A mixed batch is for inference, but the model is in training mode. Call model.eval() first."
    assert refused(net().train(), ["even", "odd"]) == text
    model = net()
    hra_fx.merge_adapter(model)
    assert refused(model, ["even", "odd"]).startswith("adapters ['even'] are merged into the weights.")
    with pytest.raises(AdapterError, match="has no adapters"):
        hra_fx.mixed_batch(nn.Linear(3, 3), ["a"]).__enter__()
    encoder: Any = nn.MultiheadAttention(8, 2)
    encoder = hra_fx.transform(nn.ModuleDict({"mix": encoder}), hra_fx.HRAConfig(target_modules=["mix"]), "a").eval()
    with pytest.raises(
        AdapterError, match=r"^mix \(MultiheadAttention\): adapters \['a'\] change the weight of this layer"
    ):
        hra_fx.mixed_batch(encoder, ["a", "__base__"]).__enter__()


@pytest.mark.parametrize("fields", [{"modules_to_save": ["two"]}, {"bias": "hra_only"}], ids=str)
def test_trained_copies(fields: dict[str, Any]) -> None:
    model: Any = hra_fx.transform(Net(), config(target_modules=["one"], **fields), "own").double()
    hra_fx.add_adapter(model, "plain", config(target_modules=["one"]))
    model.eval()
    randomise(model)
    entry = "two.weight" if "modules_to_save" in fields else "one.bias"
    assert refused(model, ["own", "plain"]) == (
        f"{entry}: the copy in use is that of adapter 'own', but rows of 'plain' need another copy (modules_to_save or "
        "bias). All rows of a batch share one copy: run these rows in a separate batch."
    )
    x = inputs(2)
    torch.testing.assert_close(model(x, adapter_names=["own", "own"]), model(x), rtol=1e-9, atol=1e-9)
    hra_fx.set_adapter(model, "plain")
    assert refused(model, ["own", "plain"]).startswith(
        f"{entry}: the copy in use is that of the base model, but rows of 'own'"
    )
    model(x, adapter_names=["plain", "__base__"])


def test_vectors_without_data() -> None:
    model = net()
    hra_fx.add_adapter(model, "empty", config(r=2), low_cpu_mem_usage=True)
    assert "the vectors of empty are on the meta device" in refused(model, ["even", "empty"])


def test_blocks_of_two_models_are_not_nested() -> None:
    one, two = net(), net()
    with (
        hra_fx.mixed_batch(one, ["even", "__base__"]),
        pytest.raises(hra_fx.AdapterError, match=r"^a mixed batch of another model is open\. Close that"),
    ):
        hra_fx.mixed_batch(two, ["even", "__base__"]).__enter__()
