"""Models that are adapted on the meta device and get their weights later equal models that are adapted with weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from adapting import config, mlp as training_mlp
from integrations.distributed.trained import CASES, Case, output
from torch import nn

import hra_fx
from hra_fx.errors import AdapterError, CheckpointError, FoldError, HRAError

F64 = torch.float64
SEED = 7
NAMES = [
    name
    for name, case in CASES.items()
    if name != "llama, checkpointing" and not case.config.keys() & {"modules_to_save", "bias", "task_type"}
]


def mlp() -> nn.Sequential:
    return training_mlp().eval()  # without dropout


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def settings(case: Case) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"r": 4, **case.config})


def with_buffers(model: nn.Module, base: nn.Module) -> nn.Module:
    """Set the buffers that no checkpoint has, such as the frequencies of rotary embeddings."""
    saved = base.state_dict()
    for name, buffer in base.named_buffers():
        if name not in saved:
            path, _, entry = name.rpartition(".")
            model.get_submodule(path).register_buffer(entry, buffer.clone(), persistent=False)
    return model


def filled(model: nn.Module, base: nn.Module) -> nn.Module:
    """Allocate memory, then load the weights of the base model by their names."""
    model.to_empty(device="cpu")
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert not found.unexpected_keys
    return with_buffers(model, base)


def assigned(model: nn.Module, base: nn.Module) -> nn.Module:
    """Assign the tensors of the base model; those of adapters stay on the meta device."""
    model.load_state_dict(copy.deepcopy(base).state_dict(), strict=False, assign=True)
    return with_buffers(model, base)


def same(model: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = model.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key].dtype != theirs[key].dtype] == []
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    flags = [{name: p.requires_grad for name, p in one.named_parameters()} for one in (model, wanted)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize(("name", "give_weights"), [*zip(NAMES, cycle([filled, assigned]), strict=False)])
def test_a_model_adapted_on_meta_starts_bit_for_bit_as_one_with_weights(
    name: str, give_weights: Callable[[nn.Module, nn.Module], nn.Module]
) -> None:
    case = CASES[name]
    base = case.base()
    torch.manual_seed(SEED)
    wanted = hra_fx.transform(copy.deepcopy(base), settings(case))
    drawn = torch.get_rng_state()
    bare = on_meta(case.make).to(F64)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    model = hra_fx.transform(bare, settings(case))
    assert all(tensor.is_meta for key, tensor in model.state_dict().items() if ".hra_u." in key)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn on the meta device"
    give_weights(model, base)
    torch.manual_seed(SEED)
    hra_fx.reset_adapters(model)
    assert torch.equal(torch.get_rng_state(), drawn), "as many numbers are drawn as by transform"
    same(model, wanted)
    assert torch.equal(output(model.eval(), case), output(wanted.eval(), case))


def test_a_trained_adapter_starts_again_in_the_same_parameters() -> None:
    model = mlp()
    torch.manual_seed(SEED)
    hra_fx.transform(model, config("0", r=3))
    hra_fx.add_adapter(model, "other", config("0"))
    start, parameters = copy.deepcopy(model), dict(model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        model[0].hra_u["other"].normal_()
    other = model[0].hra_u["other"].clone()
    torch.manual_seed(SEED)
    hra_fx.reset_adapters(model, "default")
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model[0].hra_u["other"], other)
    with torch.no_grad():
        start[0].hra_u["other"].copy_(other)
    same(model, start)


def test_a_model_without_values_neither_runs_nor_is_reset() -> None:
    base = mlp()
    x = torch.randn(2, base[0].in_features)
    model = assigned(hra_fx.transform(on_meta(mlp), config("0", r=4)), base)
    with pytest.raises(AdapterError, match=r"^0: the vectors of default are on the meta device, without data\. Call "):
        model(x)
    model = hra_fx.transform(on_meta(mlp), config("0", r=4))
    with pytest.raises(AdapterError, match=r"^0: its weight is on the meta device\. Call model\.to_empty"):
        hra_fx.reset_adapters(model)
    assert model[0].hra_u["default"].is_meta


def test_an_adapter_is_loaded_before_or_after_the_weights(tmp_path: Path) -> None:
    base = mlp()
    settings = config("0", r=3, modules_to_save=["3"], bias="all")
    trained = hra_fx.transform(copy.deepcopy(base), settings)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    hra_fx.save_adapter(trained, tmp_path)
    x = torch.randn(2, base[0].in_features)
    wanted = trained(x)
    made = [assigned(hra_fx.load_adapter(on_meta(mlp), tmp_path), base)]
    for give_weights in (assigned, filled):
        given = give_weights(hra_fx.transform(on_meta(mlp), settings), base)
        made.append(hra_fx.load_adapter(given, tmp_path))
    for model in made:
        assert torch.equal(model(x), wanted)
        with hra_fx.disable_adapters(model):
            assert torch.equal(model(x), base(x))


REFUSED: dict[str, tuple[Callable[[nn.Module, Path], object], type[HRAError], str]] = {
    "fold": (lambda model, _: hra_fx.fold(model), FoldError, r"^0.*on the meta device"),
    "save_adapter": (lambda model, path: hra_fx.save_adapter(model, path), CheckpointError, "on the meta device"),
    "set_scale": (lambda model, _: hra_fx.set_scale(model, "default", 0.5), AdapterError, r"^0: .*on the meta device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_values_is_refused(name: str, tmp_path: Path) -> None:
    act, kind, message = REFUSED[name]
    model = hra_fx.transform(on_meta(mlp), config("0", "3"))
    keys = list(model.state_dict())
    with pytest.raises(kind, match=message):
        act(model, tmp_path / "out")
    assert list(model.state_dict()) == keys and type(model[0]).__name__ == "Linear"
    assert not (tmp_path / "out").exists()
