"""`protect`: outputs for protected samples stay those of the base model while the model learns others.

The samples are so short that the inputs of each layer span fewer directions than are protected. Then the outputs for
them stay exactly the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import built
from oracles import dense_q, relative_error
from tiny import bert, gpt2, llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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


class OwnForward(nn.Linear):
    """Its input is not the argument of its call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(x) + 1, self.weight, self.bias)


class Padded(nn.Conv2d):
    """Pads its input by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 0, 1, 0)), self.weight, bias=self.bias)


class Reader(nn.Module):
    """Reads the weight of a layer, and writes into the input of another one after its call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.read = (
            nn.Embedding(64, 32),
            nn.Linear(32, 32),
            OwnForward(32, 32),
            nn.Linear(32, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        made = self.second(hidden)
        hidden = hidden + made if torch.is_grad_enabled() else hidden.add_(made)
        return self.third(hidden) + nn.functional.linear(input=made, weight=self.read.weight)


def attention() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Embedding(64, 32), layer, nn.Linear(32, 32))


def words(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(1, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
TEXTS = words(KEPT), words(OTHER)
#: name -> (the model, what to keep, what to learn, fields of the configuration)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "Llama": (llama, *TEXTS, {"target_modules": "all-linear"}),
    "vectors": (llama, *TEXTS, {"pairs": False, "target_modules": ["k_proj", "down_proj"]}),
    "odd rank": (bert, *TEXTS, {"r": 3, "target_modules": ["query", "value", "dense"]}),
    "Gram-Schmidt": (llama, *TEXTS, {"apply_GS": True, "target_modules": ["q_proj", "up_proj"]}),
    "Conv1D": (gpt2, *TEXTS, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "attention": (attention, KEPT, OTHER, {"target_modules": ["self_attn", "out_proj", "linear1", "2"]}),
    "other ways to use a weight": (Reader, KEPT, OTHER, {"target_modules": ["second", "third", "read"]}),
    "images": (Images, images(1, 3, 3, 3), images(2, 3, 3, 3), {"target_modules": ["first", "grouped", "line"]}),
    "an image with values in every fourth column, of which all patches count": (
        lambda: nn.Sequential(Padded(2, 4, 3)),
        torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=F64).repeat(1, 2, 130, 33)[..., :130],
        images(3, 2, 8, 8),
        {"target_modules": ["0"]},
    ),
    "experts": (lambda: built("mixtral", implementation="batched_mm"), *TEXTS, EXPERTS),
    "transposed experts": (lambda: built("gpt_oss", implementation="batched_mm"), *TEXTS, EXPERTS),
    "experts at once": (lambda: built("llama4"), *TEXTS, EXPERTS),
}


def output_of(model: Any, batch: Any) -> Tensor:
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(found, "logits", found)


def adapted(model: nn.Module, *targets: str, **fields: Any) -> nn.Module:
    return hra_fx.transform(model, hra_fx.HRAConfig(**({"r": 4, "target_modules": list(targets)} | fields)))


def trained(model: nn.Module, batch: Any, make: Any = torch.optim.AdamW, steps: int = 4, **options: Any) -> nn.Module:
    """The model after some steps, by default at a high rate and with a large weight decay."""
    options = options or {"lr": 0.1, "weight_decay": 1.0}
    optimizer = make([p for p in model.parameters() if p.requires_grad], **options)

    def loss() -> float:
        optimizer.zero_grad()
        found = output_of(model.train(), batch).float().square().mean()
        found.backward()
        return float(found.detach())

    for _ in range(steps):
        optimizer.step(loss)
    return model.eval()


def check_kept(model: nn.Module, base: nn.Module, kept: Any, other: Any, bound: float = 1e-9) -> None:
    assert relative_error(output_of(model, kept), output_of(base, kept)) < bound
    assert relative_error(output_of(model, other), output_of(base, other)) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_outputs_for_what_is_kept_stay_those_of_the_base_model(name: str, tmp_path: Path) -> None:
    make, kept, other, fields = CASES[name]
    base = make().to(F64).eval()
    model = adapted(copy.deepcopy(base), **fields)
    hra_fx.protect(model, [kept], DIRECTIONS)
    if not fields.keys() & {"r", "apply_GS"}:  # still the identity
        assert relative_error(output_of(model, other), output_of(base, other)) < 1e-9
    trained(model, other)
    check_kept(model, base, kept, other)
    hra_fx.save_adapter(model, tmp_path)
    check_kept(hra_fx.load_adapter(copy.deepcopy(base), tmp_path), base, kept, other)
    resumed = adapted(copy.deepcopy(base), **fields)
    resumed.load_state_dict(model.state_dict())
    check_kept(trained(resumed, other), base, kept, other)
    before = output_of(model, other)
    hra_fx.unprotect(model)
    assert relative_error(output_of(model, other), before) < 1e-9
    check_kept(hra_fx.fold(model), base, kept, other, bound=1e-8)


@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"apply_GS": True}], ids=["pairs", "odd rank", "Gram-Schmidt"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_training_does_not_move_protected_directions(dtype: torch.dtype, bound: float, fields: dict[str, Any]) -> None:
    """Against the dense `Q` of the saved vectors, in float64."""
    model: Any = adapted(llama(), "q_proj", "down_proj", **fields)
    kept = hra_fx.protect(model, [words(KEPT)], DIRECTIONS).directions
    trained(model.to(dtype), words(OTHER), lr=0.05, weight_decay=5.0)
    for path, basis in kept.items():
        layer = model.get_submodule(path)
        weight, q = layer.hra_base.detach().double(), dense_q(layer.hra_u.chain("default").detach())
        assert relative_error(weight @ q @ basis.double(), weight @ basis.double()) < 1e-6
        assert relative_error(weight @ q, weight) > 1e-2
        turned = hra_fx.effective_weight(layer).double()
        assert relative_error(turned @ basis.double(), weight @ basis.double()) < bound


def test_a_quantized_base_a_graph_and_two_adapters_are_protected() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized, base = llama().eval(), llama().to(F64).eval()
    targets = ["q_proj", "v_proj", "down_proj"]
    quantize_(quantized, Int8WeightOnlyConfig(version=2))
    model = adapted(copy.deepcopy(quantized), *targets)
    hra_fx.protect(model, [words(KEPT)], DIRECTIONS)
    check_kept(trained(model, words(OTHER)), quantized, words(KEPT), words(OTHER), bound=1e-4)
    config = hra_fx.HRAConfig(r=4, target_modules=targets)
    graph: Any = hra_fx.transform(copy.deepcopy(base), config, trace=True, example_inputs=words(OTHER))
    hra_fx.add_adapter(graph, "other", config)
    hra_fx.set_adapter(graph, ["default", "other"])
    hra_fx.protect(graph, [words(KEPT)], DIRECTIONS)
    check_kept(trained(graph, words(OTHER)), base, words(KEPT), words(OTHER))


def test_the_directions_are_those_with_the_most_of_the_inputs_and_the_report_shows_their_share() -> None:
    """More inputs than directions: the directions leave little more of the inputs than the best subspace does."""
    base = llama().eval()
    model = adapted(copy.deepcopy(base), target_modules="all-linear")
    assert "held" not in str(hra_fx.report(model))
    seen: dict[str, list[Tensor]] = {}
    for path, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
    batches = torch.randint(0, 64, (6, 2, 16), generator=torch.Generator().manual_seed(3))
    found = hra_fx.protect(model.train(), list(batches), DIRECTIONS)
    assert all(part.training for part in model.modules())
    with torch.no_grad():
        for batch in batches:
            base(batch)
    assert found.directions.keys() == seen.keys() - {"lm_head"}  # which "all-linear" leaves out
    trained(model, words(OTHER))
    for row in hra_fx.report(model):
        rows = torch.cat([x.flatten(0, -2) for x in seen[row.path]]).to(F64)
        best = torch.linalg.svdvals(rows)[DIRECTIONS:].square().sum()
        basis = found.directions[row.path].to(F64)
        assert (rows - rows @ basis @ basis.mT).square().sum() < 1.3 * best
        held = (rows @ basis).square().sum() / rows.square().sum()
        assert row.held == found.shares[row.path] == pytest.approx(float(held), abs=0.02)
        q = dense_q(model.get_submodule(row.path).hra_u.chain("default").detach())
        assert row.moved == pytest.approx(relative_error(q @ basis, basis), abs=1e-7) and row.moved < 1e-5
    assert "  moved  " in str(hra_fx.report(model))
    least = min(found.shares, key=lambda path: found.shares[path])
    assert f"14 protected layers, with up to {DIRECTIONS} directions each" in str(found)
    assert f"{found.shares[least]:.1%} in {least}" in str(found)
    other = adapted(base, target_modules="all-linear")
    other.load_state_dict(model.state_dict())
    assert all(row.held is None and row.moved is not None and row.moved < 1e-5 for row in hra_fx.report(other))


OTHER_USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transposed": lambda layer, x: x @ layer.weight.T,
    "an autoencoder": lambda layer, x: nn.functional.linear(torch.tanh(layer(x)), layer.weight.t()),
    "einsum": lambda layer, x: torch.einsum("nd,od->no", x, layer.weight),
    "some rows": lambda layer, x: nn.functional.linear(x, layer.weight[:4]).repeat(1, 2),
    "parts": lambda layer, x: sum(nn.functional.linear(x, part) for part in layer.weight.chunk(2)).repeat(1, 2),  # type: ignore[attr-defined]
    "without a product": lambda layer, x: x * layer.weight.norm(),
}


@pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES)
@pytest.mark.parametrize("conv1d", [False, True], ids=["Linear", "Conv1D"])
def test_a_layer_whose_weight_is_also_used_in_an_unknown_way_is_not_reported_as_protected(
    use: Any, conv1d: bool
) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Conv1D(8, 8) if conv1d else nn.Linear(8, 8)
            self.other = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.layer.weight.dtype)  # which is no product
            return self.other(x) + self.layer(torch.ones_like(x)) + use(self.layer, x)

    model = adapted(Both(), "layer", "other")
    with pytest.warns(hra_fx.HRAWarning, match=r"not protect these layers, .* such as transposed: layer\."):
        found = hra_fx.protect(model, [torch.randn(2, 8)], 4)
    assert found.directions.keys() == found.shares.keys() == {"other"}
    assert {row.path: row.held is None for row in hra_fx.report(model)} == {"layer": True, "other": False}


# ---- what is refused, with the model unchanged ----


def test_what_cannot_be_protected_is_refused_and_nothing_is_changed() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), "0", "2", r=2)
    x, before = torch.randn(4, 6), copy.deepcopy(model.state_dict())
    for samples, directions, kind, message in (
        ([], 2, AdapterError, r"`samples` is empty"),
        ([x * math.nan], 2, AdapterError, r"^0: its inputs contain NaN or infinite values"),
        ([x], 4, ConfigError, r"at most half of the width of each layer, got 4 for 0 of width 6"),
        ([x], 0, ConfigError, r"`directions` must be a positive int, got 0"),
        ([7], 2, AdapterError, r"^a sample must be a tensor, .* got int\."),
        (["text"], 2, AdapterError, r"`samples` contains texts, so pass tokenizer="),
        (7, 2, AdapterError, r"`samples` must be an iterable of batches, .* got int"),
        (x, 2, AdapterError, r"`samples` must be an iterable of batches, such as a list, got Tensor"),
        ([torch.randn(2, 7)], 2, RuntimeError, "shapes cannot be multiplied"),  # from the model
    ):
        with pytest.raises(kind, match=message):
            hra_fx.protect(model, samples, directions)
    with pytest.raises(AdapterError, match=r"^Linear is a submodule of a transformed model\. Pass the model"):
        hra_fx.protect(model[0], [x], 2)
    few = adapted(nn.Sequential(nn.Linear(8, 8)), "0", r=5, apply_GS=True)
    with pytest.raises(ConfigError, match=r"`r` \+ `directions` must be less than the width, got 5 \+ 3 for width 8"):
        hra_fx.protect(few, [torch.randn(2, 8)], 3)
    hra_fx.set_adapter(model, "default", inference_mode=True)
    with pytest.raises(AdapterError, match=r"^0: adapter 'default' is frozen, .*\.set_adapter\(model, 'default'\)"):
        hra_fx.protect(model, [x], 2)
    hra_fx.set_adapter(model, "default")
    hra_fx.set_scale(model, "default", 0.5)
    with pytest.raises(AdapterError, match=r"^0: adapter 'default' has a scale\. Call hra_fx\.set_scale"):
        hra_fx.protect(model, [x], 2)
    hra_fx.set_scale(model, "default", 1.0)
    hra_fx.merge_adapter(model)
    with pytest.raises(AdapterError, match=r"^adapters \['default'\] are merged into the weights\. Call unmerge"):
        hra_fx.protect(model, [x], 2)
    hra_fx.unmerge_adapter(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_hooks and model.training
    hra_fx.set_adapter(model, [])
    with pytest.raises(AdapterError, match=r"no active adapter to protect\. Call hra_fx\.set_adapter"):
        hra_fx.protect(model, [x], 2)
