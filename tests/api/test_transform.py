"""`hra_fx.transform`: what it makes of a model, a second time too, and which arguments it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from adapting import config, mlp, picture, randomise
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, ConfigError, SelectionError

# ---- what it makes ----


def test_in_place_and_the_same_object() -> None:
    model = mlp()
    layers = list(model)
    result = hra_fx.transform(model, config("0", "3"))
    assert result is model
    assert all(now is before for now, before in zip(model, layers, strict=True))
    assert isinstance(model, nn.Sequential) and isinstance(model[0], nn.Linear)
    assert type(model).__name__ == "Sequential" and type(model[0]).__name__ == "Linear"


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (nn.Linear(6, 8), 6),
        (nn.Linear(6, 8, bias=False), 6),
        (nn.Conv2d(4, 8, 3), 36),
        (nn.Conv2d(4, 8, (3, 5)), 60),
        (nn.Conv2d(4, 8, (1, 3), groups=2), 6),
        (nn.Conv2d(4, 4, 3, groups=4), 9),
        (nn.Conv2d(4, 8, 1), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("r", [1, 2, 3])
def test_keys_and_shapes(layer: nn.Module, width: int, r: int) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    before = list(model.state_dict())
    state = hra_fx.transform(model, config("0", r=r)).state_dict()
    added = {key: tuple(value.shape) for key, value in state.items() if key not in before}
    expected = {"0.hra_u.default": (width, r)}
    if r % 2:
        expected["0.hra_u.default_anchor"] = (width, 1)
    assert added == expected
    assert [key for key in state if key in before] == before


@pytest.mark.parametrize(
    ("base", "vectors"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_dtype_of_the_vectors(base: torch.dtype, vectors: torch.dtype) -> None:
    model = hra_fx.transform(mlp().to(base), config("0"))
    assert model[0].hra_u["default"].dtype is vectors
    assert model[0].weight.dtype is base
    assert model(torch.randn(2, 6, dtype=base)).dtype is base


def test_base_parameters_are_the_same_objects_and_frozen() -> None:
    model = mlp()
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    hra_fx.transform(model, config("0", "3"))
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, values[name])
        assert not parameter.requires_grad
    assert {name for name, parameter in after.items() if parameter.requires_grad} == {
        "0.hra_u.default",
        "3.hra_u.default",
    }


def test_adapter_name_is_in_the_keys() -> None:
    model = hra_fx.transform(mlp(), config("0"), "poems")
    assert {"0.hra_u.poems", "0.hra_u.poems_anchor"} < set(model.state_dict())


def test_training_flags_are_kept() -> None:
    model = mlp()
    model.eval()
    model[0].train()
    hra_fx.transform(model, config("0", "3"))
    assert [module.training for module in (model, *model)] == [False, True, False, False, False]
    assert model[0].hra_u.training
    assert not model[3].hra_u.training


@pytest.mark.parametrize("training", [True, False])
def test_under_no_grad_and_in_both_modes(training: bool) -> None:
    model = mlp().train(training)
    with torch.no_grad():
        hra_fx.transform(model, config("0", "3"))
    assert model[0].hra_u["default"].requires_grad
    model(torch.randn(2, 6)).sum().backward()
    assert model[0].hra_u["default"].grad is not None


def test_the_random_state_is_used_by_the_vectors_alone() -> None:
    draws = []
    for model in (mlp(), nn.Sequential(*mlp(), nn.Tanh())):
        torch.manual_seed(7)
        draws.append(hra_fx.transform(model, config("0"))[0].hra_u["default"].detach())
    torch.manual_seed(7)
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], hra_fx.transform(mlp(), config("0"))[0].hra_u["default"])


def test_a_layer_that_reads_a_buffer_is_rotated_too() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("start", torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.lin(self.start))

    model = hra_fx.transform(Constant().double(), config("lin", "out"))
    randomise(model)
    x = torch.randn(2, 4, dtype=torch.float64)
    before = model(x)
    torch.testing.assert_close(hra_fx.fold(model)(x), before, rtol=1e-10, atol=1e-12)


# ---- twice ----


def test_twice_changes_nothing() -> None:
    model = hra_fx.transform(mlp(), config("0", "3"))
    randomise(model)
    before, state = picture(model), copy.deepcopy(model.state_dict())
    assert hra_fx.transform(model, config("0", "3")) is model
    assert picture(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("again", "name", "message"),
    [
        (config("0", r=4), "default", r"adapter 'default': .*with another configuration"),
        (config("0", "3"), "default", r"adapter 'default': .*with another configuration"),
        (config("0"), "other", r"adapter 'other': 0 carries reflections already, of default.*fold it first"),
        (config("3"), "other", r"adapter 'other': 0 carries reflections already"),
    ],
)
def test_another_adapter_is_refused(again: hra_fx.HRAConfig, name: str, message: str) -> None:
    model = hra_fx.transform(mlp(), config("0"))
    before = picture(model)
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, again, name)
    assert picture(model) == before


def test_parent_of_a_transformed_part_is_refused() -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 2))
    hra_fx.transform(model[0], config("0"))
    before = picture(model)
    with pytest.raises(AdapterError, match=r"0\.0 carries reflections already, of default"):
        hra_fx.transform(model, config("1"))
    assert picture(model) == before


def test_part_of_a_transformed_model_is_refused() -> None:
    model = hra_fx.transform(nn.Sequential(mlp(), nn.Linear(4, 2)), config("0.0"))
    with pytest.raises(AdapterError, match="0 carries reflections already"):
        hra_fx.transform(model[0], config("3"))


def test_again_after_fold() -> None:
    model = hra_fx.fold(hra_fx.transform(mlp(), config("0")))
    hra_fx.transform(model, config("3", r=2), "second")
    assert [key for key in model.state_dict() if "hra_u" in key] == ["3.hra_u.second"]


# ---- arguments ----


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "x_anchor", "forward", "add", "width", "_anchor"])
def test_names_that_cannot_be(name: str) -> None:
    model = mlp()
    before = picture(model)
    with pytest.raises(AdapterError, match=f"adapter name {name!r}: "):
        hra_fx.transform(model, config("0"), name)
    assert picture(model) == before


@pytest.mark.parametrize("wrong", [None, {"r": 8}, "HRAConfig", 8])
def test_config_of_another_type(wrong: object) -> None:
    with pytest.raises(ConfigError, match=f"^config must be an hra_fx.HRAConfig, got builtins.{type(wrong).__name__}"):
        hra_fx.transform(mlp(), wrong)


@pytest.mark.parametrize("apply_GS", [False, True])
def test_low_cpu_mem_usage(apply_GS: bool) -> None:
    settings = config("0", "3", apply_GS=apply_GS)
    model = hra_fx.transform(mlp().double(), settings)
    randomise(model)
    empty = hra_fx.transform(mlp().double(), settings, low_cpu_mem_usage=True)
    assert {key for key, value in empty.state_dict().items() if value.is_meta} == {
        key for key in empty.state_dict() if "hra_u" in key
    }
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(empty.eval()(x), model.eval()(x))
    empty(x).sum().backward()
    assert empty[0].hra_u["default"].grad is not None


# ---- shared layers ----


class Sharing(nn.Module):
    """One layer on two paths, called on both, and once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.last = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.tanh(self.first(x))))


@pytest.mark.parametrize("targets", [["first"], ["first", "second"], ["first", "second", "last"]])
def test_a_layer_on_two_paths_has_one_reflection(targets: list[str]) -> None:
    torch.manual_seed(0)
    base = Sharing().double()
    model = hra_fx.transform(copy.deepcopy(base), config(*targets))
    randomise(model)
    assert model.first is model.second
    assert len([name for name, _ in model.named_parameters() if ".hra_u." in name]) == len(set(targets) - {"second"})
    x = torch.randn(3, 5, dtype=torch.float64)
    before = model(x)
    folded = hra_fx.fold(model)
    assert folded.first is folded.second
    torch.testing.assert_close(folded(x), before, rtol=1e-10, atol=1e-12)
    assert not torch.equal(folded.first.weight, base.first.weight)
    assert list(folded.state_dict()) == list(base.state_dict())


def test_a_layer_called_twice_is_rotated_in_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(torch.tanh(self.lin(x)))

    torch.manual_seed(0)
    model = hra_fx.transform(Twice().double(), config("lin", init_weights=False))
    weight, x = model.lin.hra_base.detach().clone(), torch.randn(3, 4, dtype=torch.float64)
    for u in model.lin.hra_u["default"].detach().unbind(1):
        weight = weight @ (torch.eye(4, dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
    linear = nn.functional.linear
    expected = linear(torch.tanh(linear(x, weight, model.lin.bias)), weight, model.lin.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_a_root_that_is_a_layer_itself_is_never_matched() -> None:
    layer = nn.Linear(4, 4)
    for settings in (config(""), hra_fx.HRAConfig(target_modules=".*"), config("Linear")):
        with pytest.raises(SelectionError, match="the model is itself a Linear"):
            hra_fx.transform(layer, settings)
    model = hra_fx.transform(nn.Sequential(layer), hra_fx.HRAConfig(target_modules=".*"))
    assert next(iter(hra_fx.report(model))).path == "0"
