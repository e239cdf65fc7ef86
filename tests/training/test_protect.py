"""`protect`: outputs for protected samples stay those of the base model while the model learns others.

The samples are so short that the inputs of each layer span fewer directions than are protected. Then the outputs for
them stay exactly the same.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from layers.checking import assert_same
from moe_models import built
from oracles import layer_q
from tiny import bert, gpt2, llama
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hra_fx
from hra_fx.errors import AdapterError, ConfigError

F64 = torch.float64
DIRECTIONS = 8
KEPT = torch.tensor([[5, 9, 2], [7, 7, 1]])
OTHER = torch.tensor([[11, 4, 8, 13], [3, 10, 12, 6]])


class Images(nn.Module):
    """Convolutions with few patches: one with groups, one with another padding mode, and a Conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, stride=2, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 2, groups=2, dilation=2, padding=1)
        self.line = nn.Conv1d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.first(x))))
        return self.line(x.flatten(2))


def attention() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Embedding(64, 32), layer, nn.Linear(32, 32))


def words(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


#: name -> (the model, what to keep, what to learn, fields of the configuration)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "Llama": (llama, words(KEPT), words(OTHER), {"target_modules": "all-linear"}),
    "odd rank": (bert, words(KEPT), words(OTHER), {"r": 3, "target_modules": ["query", "value", "dense"]}),
    "Gram-Schmidt": (llama, words(KEPT), words(OTHER), {"apply_GS": True, "target_modules": ["q_proj", "up_proj"]}),
    "Conv1D": (gpt2, words(KEPT), words(OTHER), {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "attention": (attention, KEPT, OTHER, {"target_modules": ["self_attn", "out_proj", "linear1", "2"]}),
    "images": (Images, images(1, 3, 3, 3), images(2, 3, 3, 3), {"target_modules": ["first", "grouped", "line"]}),
    "an image with values in every fourth column, of which all patches count": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3)),
        torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64).repeat(1, 2, 130, 33)[..., :130],
        images(3, 2, 8, 8),
        {"target_modules": ["0"]},
    ),
    "experts": (
        lambda: built("mixtral", implementation="batched_mm"),
        words(KEPT),
        words(OTHER),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
    ),
}


def output_of(model: Any, batch: Any) -> Tensor:
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(found, "logits", found)


def trained(model: nn.Module, batch: Any, steps: int = 4, *, prepare: Callable[[Any], object]) -> Any:
    """The optimizer after some steps at a high rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepare(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        output_of(model.train(), batch).square().sum().backward()
        optimizer.step()
    model.eval()
    return optimizer


def distance(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def adapted(model: nn.Module, *targets: str, lr: float = 1e-3, **fields: Any) -> tuple[nn.Module, Any]:
    """A model with adapters, and an optimizer of their vectors."""
    model = hra_fx.transform(model, hra_fx.HRAConfig(**({"r": 2, "target_modules": list(targets)} | fields)))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def check_kept(model: nn.Module, base: nn.Module, kept: Any, other: Any, bound: float = 1e-9) -> None:
    with torch.no_grad():
        assert distance(output_of(model, kept), output_of(base, kept)) < bound
        assert distance(output_of(model, other), output_of(base, other)) > 0.01


@pytest.mark.filterwarnings("ignore:train_pairs. these vectors are not trained in pairs:hra_fx.HRAWarning")
@pytest.mark.parametrize("pairs", ["", "before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_for_what_is_kept_stay_those_of_the_base_model(name: str, pairs: str, tmp_path: Path) -> None:
    make, kept, other, fields = CASES[name]
    base = make().to(F64).eval()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(**({"r": 4} | fields)))

    def prepare(optimizer: Any) -> None:
        if pairs == "before":
            hra_fx.train_pairs(optimizer, model)
        hra_fx.protect(optimizer, model, [kept], DIRECTIONS)
        if pairs == "after":
            hra_fx.train_pairs(optimizer, model)
        assert_same(output_of(model.eval(), other), output_of(base, other), rtol=1e-9)  # still the identity

    trained(model, other, prepare=prepare)
    check_kept(model, base, kept, other)
    hra_fx.save_adapter(model, tmp_path)
    check_kept(hra_fx.load_adapter(copy.deepcopy(base), tmp_path), base, kept, other)
    check_kept(hra_fx.fold(model), base, kept, other, bound=1e-8)


def test_layers_of_peft_and_of_a_quantized_base_are_protected() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base, quantized, targets = llama().to(F64).eval(), llama().eval(), ["q_proj", "v_proj", "down_proj"]
    quantize_(quantized, Int8WeightOnlyConfig(version=2))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.HRAConfig(r=4, target_modules=targets))
    ours = hra_fx.transform(copy.deepcopy(quantized), hra_fx.HRAConfig(r=4, target_modules=targets))
    for model in (theirs, ours):
        trained(
            model, words(OTHER), prepare=lambda one, model=model: hra_fx.protect(one, model, [words(KEPT)], DIRECTIONS)
        )
    check_kept(ours, quantized, words(KEPT), words(OTHER), bound=1e-4)
    check_kept(theirs, base, words(KEPT), words(OTHER))
    check_kept(theirs.merge_and_unload(), base, words(KEPT), words(OTHER))


def test_a_graph_in_bfloat16_and_a_second_adapter_are_protected() -> None:
    base = llama().to(torch.bfloat16).eval()
    config = hra_fx.HRAConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
    model: Any = hra_fx.transform(copy.deepcopy(base), config, trace=True, example_inputs=words(OTHER))
    hra_fx.add_adapter(model, "other", config)
    hra_fx.set_adapter(model, ["default", "other"])
    kept: dict[str, Tensor] = {}

    def prepare(optimizer: Any) -> None:
        kept.update(hra_fx.protect(optimizer, model, [words(KEPT)], DIRECTIONS))

    trained(model, words(OTHER), prepare=prepare)
    for path, basis in kept.items():
        layer = model.get_submodule(path)
        weight, turned = layer.hra_base.double(), hra_fx.effective_weight(layer).double()
        assert distance(turned @ basis.double(), weight @ basis.double()) < 0.01 < distance(turned, weight)
    check_kept(model, base, words(KEPT), words(OTHER), bound=0.05)


def test_the_directions_are_those_with_the_most_of_the_inputs() -> None:
    """More inputs than directions: the directions leave little more of the inputs than the best subspace does."""
    base = llama().eval()
    model, optimizer = adapted(copy.deepcopy(base), target_modules="all-linear")
    seen: dict[str, list[Tensor]] = {}
    for path, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
    batches = torch.randint(0, 64, (6, 2, 16), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    found = hra_fx.protect(optimizer, model.train(), loader, DIRECTIONS)
    assert all(part.training for part in model.modules())
    with torch.no_grad():
        for batch in batches:
            base(batch)
    assert found.keys() == seen.keys() - {"lm_head"}  # which "all-linear" leaves out
    for path in found:
        rows = torch.cat([x.flatten(0, -2) for x in seen[path]]).to(F64)
        best = torch.linalg.svdvals(rows)[DIRECTIONS:].square().sum()
        basis = found[path].to(F64)
        assert (rows - rows @ basis @ basis.mT).square().sum() < 1.3 * best
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj"] is found[f"{attention}.k_proj"] is found[f"{attention}.v_proj"]


def test_a_resumed_run_protects_the_same_directions_and_needs_them() -> None:
    base = llama().to(F64).eval()
    config = hra_fx.HRAConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = hra_fx.transform(copy.deepcopy(base), config)
    optimizer = trained(model, words(OTHER), prepare=lambda one: hra_fx.protect(one, model, [words(KEPT)], DIRECTIONS))
    torch.save((model.state_dict(), optimizer.state_dict()), file := io.BytesIO())
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    again = hra_fx.transform(copy.deepcopy(base), config)
    again.load_state_dict(values)

    def resume(one: Any) -> None:
        hra_fx.protect(one, again, [words(OTHER)], DIRECTIONS)  # the directions of the state replace these
        one.load_state_dict(state)

    trained(again, words(OTHER), prepare=resume)
    check_kept(again, base, words(KEPT), words(OTHER))
    fresh = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad])
    unprotected = copy.deepcopy(fresh.state_dict())
    hra_fx.protect(fresh, again, [words(KEPT)], DIRECTIONS)
    with pytest.raises(AdapterError, match=r"the state was saved without protection\. Leave protect out, or start"):
        fresh.load_state_dict(unprotected)


def test_the_report_says_how_far_protected_directions_move() -> None:
    model, optimizer = adapted(llama(), "q_proj", "down_proj")
    assert "moves protected" not in str(hra_fx.report(model))
    kept = hra_fx.protect(optimizer, model, [words(KEPT)], DIRECTIONS)
    trained(model, words(OTHER), prepare=lambda _: None)
    for row in hra_fx.report(model):  # after steps of an optimizer without protection
        basis, q = kept[row.path].to(F64), layer_q(model.get_submodule(row.path)).detach()
        assert row.protected == pytest.approx(distance(q @ basis, basis), rel=1e-5)
        assert row.protected > 1e-3
    hra_fx.protect(optimizer, model, [words(KEPT)], DIRECTIONS)
    report = hra_fx.report(model)
    assert all(row.protected is not None and row.protected < 1e-6 for row in report) and "0.00%" in str(report)


class Written(nn.Module):
    """Writes into the input of a layer after its call, and reads a weight as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.read = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.clone()
        made = self.first(hidden)
        with_gradients = torch.is_grad_enabled()
        hidden = hidden + torch.tanh(made) if with_gradients else hidden.add_(torch.tanh(made))
        return made + self.second(hidden) + nn.functional.linear(made, self.read.weight.clone())


def test_inputs_are_those_of_each_call() -> None:
    """One tensor with new values in each batch; all inputs of a layer span at most four directions."""
    torch.manual_seed(0)
    base = Written().to(F64)
    model, _ = adapted(copy.deepcopy(base), "first", "second", "read", r=4)
    kept, other = torch.randn(2, 2, 24, dtype=F64), torch.randn(8, 24, dtype=F64)
    held = torch.empty(2, 24, dtype=F64)
    refilled = (held.copy_(batch) for batch in kept)
    trained(model, other, prepare=lambda optimizer: hra_fx.protect(optimizer, model, refilled, DIRECTIONS))
    for batch in kept:
        check_kept(model, base, batch, other)


def test_autocast_does_not_hide_weights_that_are_read() -> None:
    base = built("mixtral", torch.float32).eval()
    model, optimizer = adapted(base, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    forward = model.forward

    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = under_autocast
    hra_fx.protect(optimizer, model, [words(KEPT)], DIRECTIONS)
    assert all(row.protected is not None for row in hra_fx.report(model))


def test_each_optimizer_protects_its_own_adapters() -> None:
    base = llama().to(F64).eval()
    config = hra_fx.HRAConfig(r=4, target_modules=["q_proj"])
    model = hra_fx.transform(copy.deepcopy(base), config)
    hra_fx.add_adapter(model, "other", config)
    optimizers = {}
    for name, kept in (("default", KEPT), ("other", OTHER)):
        hra_fx.set_adapter(model, name)
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        hra_fx.protect(optimizers[name], model, [words(kept)], DIRECTIONS)
    hra_fx.set_adapter(model, "default")
    optimizers["default"].load_state_dict(optimizers["default"].state_dict())
    for _ in range(3):
        output_of(model, words(OTHER)).square().sum().backward()
        optimizers["default"].step()
    check_kept(model, base, words(KEPT), words(OTHER))


def test_an_anchor_that_is_loaded_later_is_projected() -> None:
    base = llama().to(F64).eval()
    other, _ = adapted(copy.deepcopy(base), "q_proj", "up_proj", apply_GS=True)
    model, optimizer = adapted(copy.deepcopy(base), "q_proj", "up_proj", apply_GS=True, lr=0.1)
    hra_fx.protect(optimizer, model, [words(KEPT)], DIRECTIONS)
    model.load_state_dict(other.state_dict())
    output_of(model, words(OTHER)).square().sum().backward()
    optimizer.step()
    check_kept(model, base, words(KEPT), words(OTHER))


# ---- what is refused, with the model unchanged ----


def test_what_cannot_be_protected_is_refused_and_nothing_is_changed() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0", "2")
    x, before = torch.randn(4, 6), copy.deepcopy(model.state_dict())
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    for batches, directions, used, kind, message in (
        ([], 2, optimizer, AdapterError, r"`batches` is empty"),
        ([x * math.nan], 2, optimizer, AdapterError, r"^0: its inputs contain NaN or infinite values"),
        (
            [x],
            4,
            optimizer,
            ConfigError,
            r"at most half of the width of each layer, got 4 for 0\.hra_u\.default of width",
        ),
        ([x], 0, optimizer, ConfigError, r"`directions` must be a positive int, got 0"),
        ([x], 2, other, AdapterError, r"no vectors of Sequential.* call protect before"),
        ([x], 2, torch.optim.ASGD(list(optimizer.param_groups[0]["params"])), AdapterError, r"ASGD averages the param"),
        ([x], 2, None, AdapterError, r"must be a torch\.optim\.Optimizer, got NoneType"),
        (["text"], 2, optimizer, AdapterError, r"^a batch must be a tensor, .* got str\."),
        (x, 2, optimizer, AdapterError, r"`batches` must be an iterable of batches, got one batch \(Tensor"),
        ({"input": x}, 2, optimizer, AdapterError, r"`batches` must be an iterable of batches, got one batch \(dict"),
        ([torch.randn(2, 7)], 2, optimizer, RuntimeError, "shapes cannot be multiplied"),  # from the model
    ):
        with pytest.raises(kind, match=message):
            hra_fx.protect(used, model, batches, directions)
    with pytest.raises(AdapterError, match=r"^Linear is a submodule of a transformed model\. Pass the model"):
        hra_fx.protect(optimizer, model[0], [x], 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "hra_protected" not in optimizer.param_groups[0] and not model[0]._forward_pre_hooks


def test_adapters_that_do_not_act_as_they_are_other_paths_and_other_models_are_refused() -> None:
    model, optimizer = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0")
    x = torch.randn(2, 6)
    hra_fx.protect(optimizer, model, [x], 2)
    wrapped = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    hra_fx.protect(wrapped, nn.Sequential(model), [x], 2)
    with pytest.raises(AdapterError, match=r"do not have protected directions for the same layer"):
        wrapped.load_state_dict(optimizer.state_dict())
    model.double()(x.double()).sum().backward()
    optimizer.step()  # in the new dtype
    hra_fx.merge_adapter(model)
    with pytest.raises(AdapterError, match=r"^0\.hra_u\.default is merged into the weight\. Unmerge"):
        hra_fx.protect(optimizer, model, [x.double()], 2)
    few, steps = adapted(nn.Sequential(nn.Linear(8, 8)), "0", r=5, apply_GS=True)
    with pytest.raises(ConfigError, match=r"`r` \+ `directions` must be less than the width, got 5 \+ 3 for width 8"):
        hra_fx.protect(steps, few, [torch.randn(2, 8)], 3)
    models = [adapted(nn.Sequential(nn.Linear(6, 8)), "0")[0] for _ in range(2)]
    optimizer = torch.optim.AdamW([one for model in models for one in model.parameters() if one.requires_grad])
    hra_fx.protect(optimizer, models[0], [torch.randn(2, 6)], 2)
    with pytest.raises(AdapterError, match=r"already protects other layers with these paths: 0\. Its state"):
        hra_fx.protect(optimizer, models[1], [torch.randn(2, 6)], 2)
    hra_fx.protect(optimizer, models[0], [torch.randn(2, 6)], 2)
