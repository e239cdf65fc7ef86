"""Loading over other adapters and wrapped blocks; what is accepted; and what is not saved."""

from __future__ import annotations

import copy
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import config, mlp, randomise
from checkpoint.damaging import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    refused,
    saved,
    values,
    weights,
    with_config,
    with_weights,
)
from checkpoint.disk import made
from oracles import dense_q, dense_weight, relative_error
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import hra_fx
from hra_fx import AdapterError, CheckpointError, HRAWarning

X = torch.linspace(-1, 1, 12).view(2, 6)


def named(name: str, model: nn.Module | None = None) -> Any:
    model = mlp() if model is None else model
    model.name_or_path = name
    return model


def test_another_name_of_the_base_is_warned_of_and_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0", base=lambda: named("org/small-v1"))
    assert json.loads((folder / CONFIG_NAME).read_text())["base_model_name_or_path"] == "org/small-v1"
    model = named("org/small-v2")
    hra_fx.load_adapter(copy.deepcopy(model), folder)  # the weights are those of the base model
    with torch.no_grad():
        model[0].weight.normal_()
    with pytest.warns(HRAWarning) as caught:
        hra_fx.load_adapter(model, folder)
    assert [str(each.message) for each in caught] == [
        f"{folder / WEIGHTS_NAME}: the adapter was trained on 'org/small-v1', but this model is 'org/small-v2'. Make "
        "sure that it has the same weights, without an adapter folded or merged into them."
    ]
    assert caught[0].filename == __file__
    assert torch.equal(model[0].hra_u["default"], weights(folder)[f"{PREFIX}0.hra_u"][:, 1:])


# ---- adapters that are in the way ----


def adapted(*targets: str, **fields: Any) -> Any:
    model = hra_fx.transform(mlp(), config(*targets, **fields))
    randomise(model)
    return model


def test_merged_adapters_are_in_the_way(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0")
    model = adapted("0")
    hra_fx.merge_adapter(model)
    message = refused(lambda model: hra_fx.load_adapter(model, folder), model, AdapterError)
    assert "merged into the weights. Call unmerge_adapter first." in message


STRUCTURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "other layers": (("3",), {"r": 3}),
    "another rank": (("0",), {"r": 5}),
    "Gram-Schmidt": (("0",), {"r": 3, "apply_GS": True}),
    "a head": (("0",), {"r": 3, "modules_to_save": ["3"]}),
    "biases": (("0",), {"r": 3, "bias": "hra_only"}),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_an_adapter_of_another_structure_is_in_the_way(kind: str, tmp_path: Path) -> None:
    targets, fields = STRUCTURES[kind]
    ours, theirs = saved(tmp_path / "ours", "0"), saved(tmp_path / "theirs", *targets, **fields)
    for present, folder in (((("0",), {"r": 3}), theirs), ((targets, fields), ours)):
        model = adapted(*present[0], **present[1])
        message = refused(lambda model, folder=folder: hra_fx.load_adapter(model, folder), model, AdapterError)
        assert message.startswith("adapter 'default' exists in the model, but with other ")
        assert "Delete it first (hra_fx.delete_adapter), or load under another adapter_name." in message


# ---- let through ----


def by_oracle(folder: Path, model: nn.Sequential) -> Tensor:
    """Output of the base with the file's plain chains multiplied into its weights, in float64."""
    x = X.double()
    for path, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            chain = weights(folder).get(f"{PREFIX}{path}.hra_u")
            weight = layer.weight if chain is None else dense_weight(layer.weight, dense_q(chain))
            x = nn.functional.linear(x, weight.double(), layer.bias.double())
        elif isinstance(layer, nn.ReLU):
            x = x.relu()
    return x


STARTS: dict[str, dict[str, Any]] = {
    "anchored": {"r": 3},
    "a chain as long as that with the anchor": {"r": 4},
}


@pytest.mark.parametrize("file", STARTS)
@pytest.mark.parametrize("present", STARTS)
def test_an_adapter_of_the_same_rank_is_replaced_whatever_its_start_was(
    present: str, file: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, "0", **STARTS[file])
    model = adapted("0", **STARTS[present])
    fits = STARTS[present]["r"] in (STARTS[file]["r"], weights(folder)[f"{PREFIX}0.hra_u"].shape[1])
    if not fits:
        assert "other layers, r, apply_GS" in refused(
            lambda model: hra_fx.load_adapter(model, folder), model, AdapterError
        )
        return
    held = model[0].hra_u["default"]
    hra_fx.load_adapter(model, folder)
    assert model[0].hra_u["default"] is held
    assert relative_error(model.eval()(X), by_oracle(folder, mlp())) < 1e-5


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupted_load_restores_the_old_values(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "0", r=3, modules_to_save=["3"])
    model = adapted("0", r=3, modules_to_save=["3"])
    before, copy_, calls = values(model), Tensor.copy_, [0]

    def interrupted(own: Tensor, *args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return copy_(own, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tensor, "copy_", interrupted)
        hra_fx.load_adapter(model, folder)
    after = values(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    hra_fx.load_adapter(model, folder)
    assert torch.equal(model[3].weight, weights(folder)[f"{PREFIX}3.weight"])


@pytest.mark.parametrize("r", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_narrow_file_is_float32_inside(dtype: torch.dtype, r: int, tmp_path: Path) -> None:
    folder = saved(tmp_path, "0", "3", r=r)
    with_weights(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))(folder)
    models = {
        "plain": mlp(),
        "beside": hra_fx.transform(mlp(), config("0", r=2), "other"),
        "replacing": hra_fx.transform(mlp(), config("0", "3", r=r)),
    }
    for state, model in models.items():
        hra_fx.load_adapter(model, folder)
        hra_fx.set_adapter(model, "default")
        assert model[0].hra_u["default"].dtype == torch.float32, state
        assert relative_error(model.eval()(X), by_oracle(folder, mlp())) < 1e-5, state


def test_keys_without_pefts_prefix_are_let_through(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0", modules_to_save=["3"])
    wanted = hra_fx.load_adapter(mlp(), folder).eval()(X)

    def strip(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

    with_weights(strip)(folder)
    assert "0.hra_u" in weights(folder)
    assert torch.equal(hra_fx.load_adapter(mlp(), folder).eval()(X), wanted)


def test_entries_of_a_newer_peft_are_let_through_and_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path / "newer", "0")
    newer = {"peft_version": "9.1.0", "rotation_kind": "cayley", "options": {"a": [1, None]}}
    with_config(**newer)(folder)
    model = hra_fx.load_adapter(mlp(), folder)
    hra_fx.save_adapter(model, tmp_path / "again")
    assert newer.items() <= json.loads((tmp_path / "again" / CONFIG_NAME).read_text()).items()


def test_a_head_that_the_model_does_not_have_is_let_through(tmp_path: Path) -> None:
    """PEFT writes every name that a head of the task may have."""
    folder = saved(tmp_path, "0", modules_to_save=["3"])
    with_config(modules_to_save=["classifier", "3", "score"])(folder)
    assert torch.equal(hra_fx.load_adapter(mlp(), folder)[3].weight, weights(folder)[f"{PREFIX}3.weight"])


# ---- not saved ----


def unsaved(model: nn.Module, folder: Path) -> str:
    """The message of the refusal, after a look that the folder and the model are as they were."""
    before, held = made.picture(folder), values(model)
    with pytest.raises(CheckpointError) as caught:
        hra_fx.save_adapter(model, folder)
    assert made.picture(folder) == before
    assert values(model).keys() == held.keys()
    return str(caught.value)


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0")
    model = hra_fx.transform(mlp(), config("0"), low_cpu_mem_usage=True)
    message = unsaved(model, folder)
    assert message == (
        f"{folder / WEIGHTS_NAME}: '{PREFIX}0.hra_u' is on the meta device and has no values. Load the model first."
    )


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 3}, {"r": 3, "apply_GS": True}], ids=str)
def test_an_adapter_that_diverged_is_not_saved(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path, "0")
    model = adapted("0", **fields)
    with torch.no_grad():
        model[0].hra_u["default"][1, 0] = float("nan")
    message = unsaved(model, folder)
    assert message.startswith(f"{folder / WEIGHTS_NAME}: '{PREFIX}0.hra_u' has ")
    assert "Nothing was written. Save a state from before the training diverged." in message


# ---- blocks in torch's `checkpoint_wrapper`, which puts a name into the paths of modules, but not of `state_dict` ----

CONFIG = hra_fx.HRAConfig(r=3, target_modules=["up"], modules_to_save=["down"], bias="all", init_weights=False)


def base(*, wrapped: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = [OrderedDict(up=nn.Linear(6, 6), down=nn.Linear(6, 6)) for _ in range(2)]
    model = nn.Sequential(*map(nn.Sequential, blocks)).double()
    return wrap(model) if wrapped else model


def wrap(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda part: type(part) is nn.Sequential and part is not model)
    return model


@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_adapters_are_those_of_the_model_without_wrappers(first: str, tmp_path: Path) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    plain = hra_fx.transform(base(wrapped=False), CONFIG)
    wanted = plain(x)
    torch.manual_seed(1)
    model = hra_fx.transform(base(wrapped=first == "wrapped"), CONFIG)
    model = model if first == "wrapped" else wrap(model)
    for part, folder in ((plain, "plain"), (model, "model")):
        hra_fx.save_adapter(part, tmp_path / folder)
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("plain", "model")]
    assert files[0] == files[1]
    torch.testing.assert_close(model(x), wanted)
    hra_fx.reset_adapters(model)
    assert not torch.equal(model(x), wanted)
    hra_fx.load_adapter(model, tmp_path / "plain")
    torch.testing.assert_close(model(x), wanted)
    assert [row.path for row in hra_fx.report(model).rows] == ["0.up", "1.up"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(hra_fx.fold(model)(x), wanted)
    loaded = hra_fx.load_adapter(base(wrapped=True), tmp_path / "model")
    torch.testing.assert_close(loaded(x), wanted)
