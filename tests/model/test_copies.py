"""`modules_to_save` and `bias`: every adapter has copies of its own; which parameters are trained, as in PEFT."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses
from torch import Tensor, nn

import hra_fx
from hra_fx.layers.trained_copies import all_copies

HEAD: dict[str, Any] = {"modules_to_save": ["head"]}


def owned(model: nn.Module, adapter: str) -> set[int]:
    """Identities of the vectors and copies of an adapter."""
    vectors = {id(parameter) for key, parameter in model.named_parameters() if key.endswith(f"hra_u.{adapter}")}
    copied = (copies.tensors(owner, adapter).values() for owner, copies in all_copies(model).values())
    return vectors | {id(tensor) for tensors in copied for tensor in tensors if isinstance(tensor, nn.Parameter)}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[int]:
    """One step; gives the identities of the parameters that changed."""
    before = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    optimizer.zero_grad()
    model(normal(8, 6)).square().mean().backward()
    optimizer.step()
    return {id(p) for p in model.parameters() if not torch.equal(p, before[id(p)])}


def test_one_optimizer_over_all_parameters_trains_each_adapters_own_head_and_vectors() -> None:
    plain, model = adapted(net(), a=config("first", **HEAD), b=config("first", "second", r=3, **HEAD))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    heads, x = {}, normal(4, 6)
    for name in ("a", "b", "b", "a"):
        hra_fx.set_adapter(model, name)
        assert train_step(model, optimizer) == owned(model, name)
        heads[name] = model.head.weight
        head = {f"head.{key}": tensor.detach() for key, tensor in model.head.named_parameters() if "." not in key}
        assert_close(model(x), oracle(plain, model, [name], x, **head))
    assert heads["a"] is not heads["b"]
    hra_fx.set_adapter(model, [])
    assert torch.equal(model.head.weight, plain.head.weight)
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize(("bias", "trained"), [("all", {"first", "norm", "second", "head"}), ("hra_only", {"second"})])
def test_biases_are_each_adapters_own(bias: str, trained: set[str]) -> None:
    plain, model = adapted(net(), a=config("second", bias=bias), b=config("first", bias="hra_only"))
    assert train_step(model, torch.optim.SGD(model.parameters(), lr=0.1)) == owned(model, "a")
    assert {path for path, (_, copies) in all_copies(model).items() if "a" in copies.copied} == trained
    ours = {f"{path}.bias": plain.get_submodule(path).bias for path in ("first", "norm", "second", "head")}
    ours |= {f"{path}.bias": model.get_submodule(path).bias.detach() for path in trained}
    x = normal(4, 6)
    assert_close(model(x), oracle(plain, model, ["a"], x, **ours))
    hra_fx.set_adapter(model, "b")
    assert_close(model(x), oracle(plain, model, ["b"], x, **{"first.bias": model.first.bias.detach()}))
    assert not torch.equal(model.first.bias, plain.first.bias)


def test_the_buffers_of_a_norm_switch_with_it() -> None:
    saved = {"modules_to_save": ["norm"]}
    plain, model = adapted(net(), a=config("first", **saved), b=config("first", **saved))
    model.train()
    means = {}
    for name, seed in (("a", 1), ("b", 2)):
        hra_fx.set_adapter(model, name)
        model(normal(16, 6, seed=seed) + seed)
        means[name] = model.norm.running_mean.clone()
        assert int(model.norm.num_batches_tracked) == 1
    assert not torch.equal(means["a"], means["b"])
    hra_fx.set_adapter(model, "a")
    assert torch.equal(model.norm.running_mean, means["a"])
    hra_fx.set_adapter(model, [])
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 0


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(self.embed(x))[0]
        return output


def test_a_saved_lstm_runs_on_the_copies_in_place() -> None:
    torch.manual_seed(0)
    saved = {"modules_to_save": ["lstm"]}
    plain, model = adapted(Recurrent().double(), a=config("embed", **saved), b=config("embed", **saved))
    x = normal(2, 4, 6)
    for order in ("a", "b", "a", []):
        hra_fx.set_adapter(model, order)
        named = {key: weight for key, weight in model.lstm.named_parameters() if "." not in key}
        assert all(one is two for one, two in zip(model.lstm._flat_weights, named.values(), strict=True))
        lstm = {f"lstm.{key}": weight.detach() for key, weight in named.items()}
        assert_close(model(x), oracle(plain, model, [order] if order else [], x, **lstm))
    assert torch.equal(model.lstm.weight_hh_l1, plain.lstm.weight_hh_l1)
    hra_fx.set_adapter(model, "b")
    assert train_step(model, torch.optim.SGD(model.parameters(), lr=0.1)) == owned(model, "b")


class Twice(nn.Module):
    """One head, reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.head(self.body(x))))


@pytest.mark.parametrize("names", [["again"], ["head", "again"]])
def test_a_shared_module_is_copied_once(names: list[str]) -> None:
    torch.manual_seed(0)
    plain, model = adapted(Twice().double(), a=config("body", modules_to_save=names), b=config("body"))
    assert model.head is model.again
    x = normal(4, 6)
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    # functional_call leaves what it replaced in a module with two names, hence the copy.
    assert_close(model(x), oracle(copy.deepcopy(plain), model, ["a"], x, **head))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 6 + 6 * 6 + 6
    hra_fx.set_adapter(model, "b")
    assert_close(model(x), oracle(plain, model, ["b"], x))


def test_two_adapters_with_copies_of_one_module_are_not_used_together() -> None:
    model = adapted(net(), a=config("first", **HEAD), b=config("second", **HEAD), c=config("second", bias="all"))[1]
    text = (
        r"^adapters \['{}', '{}'\] each have a trained copy of head \(modules_to_save or bias\), and only one copy can "
        r"be used at a time\. Set one of these adapters\.$"
    )
    for act, names in (
        (lambda: hra_fx.set_adapter(model, ["a", "b"]), "ab"),
        (lambda: hra_fx.set_adapter(model, ["c", "b"]), "cb"),
        (lambda: hra_fx.fold(model, ["b", "a"]), "ba"),
        (lambda: hra_fx.merge_adapter(model, "b"), "ba"),  # `b` would act before the active `a`
    ):
        with refuses(model, text.format(*names)):
            act()


def test_one_with_copies_acts_together_with_one_without() -> None:
    plain, model = adapted(net(), a=config("first", **HEAD), b=config("first", "second", r=3))
    hra_fx.set_adapter(model, ["b", "a"])
    x = normal(4, 6)
    head = {f"head.{key}": getattr(model.head, key).detach() for key in ("weight", "bias")}
    assert not torch.equal(head["head.weight"], plain.head.weight)
    assert_close(model(x), oracle(plain, model, ["b", "a"], x, **head))


class Gate(nn.Sequential):
    """Runs its children one by one, and owns a parameter besides."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.ReLU())
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def test_a_container_that_owns_a_parameter_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Gate())
    text = r"^1 \(Gate\): it is a container with its own tensors \(gain\), which cannot be copied\. Name other"
    with refuses(model, text, hra_fx.UnsupportedLayerError):
        hra_fx.transform(model, config("0", modules_to_save=["1"]))


def test_a_copy_that_is_not_finite_is_not_folded() -> None:
    _, model = adapted(net(), a=config("second", **HEAD))
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with refuses(model, r"^head: its trained copy is not finite", hra_fx.FoldError):
        hra_fx.fold(model)


# ---- which parameters are trained ----


SETTINGS = {
    "all": {"bias": "all"},
    "hra_only": {"bias": "hra_only"},
    "modules_to_save, all": {"modules_to_save": ["head", "norm"], "bias": "all"},
    "inference": {"inference_mode": True, "modules_to_save": ["head"]},
}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, flag in flags(model).items() if flag}


def trained_by_peft(fields: dict[str, Any]) -> set[str]:
    settings = peft.HRAConfig(r=2, target_modules=["first", "second"], **fields)
    names = trained(peft.get_peft_model(net(), settings))
    plain = {name.replace("base_model.model.", "").replace(".base_layer", "") for name in names}
    return {name.replace(".modules_to_save.default", "") for name in plain}


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_parameters_that_peft_trains_are_trained_and_a_fold_restores_all_flags(fields: dict[str, Any]) -> None:
    model = net()
    model.norm.weight.requires_grad_(False)
    model.first.weight.requires_grad_(False)
    before = flags(model)
    hra_fx.transform(model, config("first", "second", **fields))
    assert trained(model) == trained_by_peft(fields)
    if trained(model):
        model(normal(4, 6)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained(model)
    twin = copy.deepcopy(model)
    assert flags(hra_fx.fold(model)) == flags(hra_fx.fold(twin)) == before


def test_inference_mode_freezes_biases_too_which_peft_leaves_trainable() -> None:
    fields = {"inference_mode": True, "bias": "all"}
    assert trained(hra_fx.transform(net(), config("first", **fields))) == set()
    assert "first.bias" in trained_by_peft(fields)


def test_flags_that_the_user_changed_stay_after_a_fold() -> None:
    model = net()
    model.norm.requires_grad_(False)
    hra_fx.transform(model, config("first"))
    for part in (model.norm.weight, model.first.weight, model.head):
        part.requires_grad_(True)
    assert {name for name, flag in flags(hra_fx.fold(model)).items() if not flag} == {"norm.bias"}
