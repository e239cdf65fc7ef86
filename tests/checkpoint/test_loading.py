"""Loading adapters: in place of others, damaged ones, and files that differ from those that `save_adapter` writes."""

from __future__ import annotations

import itertools
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from adapting import adapted, mlp, randomise
from checkpoint.damaging import (
    CONFIG_NAME,
    MODELS,
    PREFIX,
    WEIGHTS_NAME,
    saved,
    weights,
    with_config,
    with_weights,
)
from checkpoints import picture
from model.many import refuses
from oracles import dense_q, dense_weight, layer_q, relative_error
from peft_sides import same_tensors
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import hra_fx
from hra_fx import CheckpointError, ConfigError

X = torch.linspace(-1, 1, 12).view(2, 6)


# ---- adapters that cannot be replaced ----


@pytest.mark.parametrize("name", ["default", "other"])
def test_nothing_is_loaded_into_a_part_of_a_model_or_while_adapters_are_merged(name: str, tmp_path: Path) -> None:
    folder, model = saved(tmp_path, "0"), adapted(nn.ModuleDict({"body": mlp()}), "0")
    with refuses(model, r"^Sequential is a submodule of a transformed model\. Pass the model that was transformed\.$"):
        hra_fx.load_adapter(model["body"], folder, name)
    model = adapted(mlp(), "0")
    hra_fx.merge_adapter(model)
    with refuses(model, r"merged into the weights\. Call unmerge_adapter first\."):
        hra_fx.load_adapter(model, folder)


STRUCTURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "other layers": (("3",), {"r": 3}),
    "another rank": (("0",), {"r": 5}),
    "Gram-Schmidt": (("0",), {"r": 3, "apply_GS": True}),
    "a head": (("0",), {"r": 3, "modules_to_save": ["3"]}),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_an_adapter_with_another_structure_is_not_replaced(kind: str, tmp_path: Path) -> None:
    targets, fields = STRUCTURES[kind]
    ours, theirs = saved(tmp_path / "ours", "0"), saved(tmp_path / "theirs", *targets, **fields)
    for present, folder in (((("0",), {"r": 3}), theirs), ((targets, fields), ours)):
        model = adapted(mlp(), *present[0], **present[1])
        with refuses(
            model, r"^adapter 'default' exists in the model, but with other .*Delete it first .*, or load under"
        ):
            hra_fx.load_adapter(model, folder)


# ---- adapters that are loaded ----


def by_oracle(folder: Path) -> Tensor:
    """The output of the base model with the plain chains of the file multiplied into its weights, in float64."""
    base = mlp().double().eval()
    rotated = {}
    for key, chain in weights(folder).items():
        name = key.removeprefix(PREFIX).replace("hra_u", "weight")
        rotated[name] = dense_weight(base.get_parameter(name), dense_q(chain))
    return torch.func.functional_call(base, rotated, X.double())


@pytest.mark.parametrize(("dtype", "r"), [(torch.float16, 3), (torch.bfloat16, 4), (torch.float8_e4m3fn, 3)])
def test_a_file_with_a_narrow_dtype_is_loaded_in_float32(dtype: torch.dtype, r: int, tmp_path: Path) -> None:
    folder = saved(tmp_path, "0", "3", r=r)
    with_weights(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))(folder)
    for state, make in MODELS.items():
        model: Any = make(folder)
        hra_fx.load_adapter(model, folder)
        hra_fx.set_adapter(model, "default")
        assert model[0].hra_u["default"].dtype == torch.float32, state
        assert relative_error(model.eval()(X), by_oracle(folder)) < 1e-5, state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pairs_in_16_bits_keep_a_small_rotation_and_so_does_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Vectors in 16 bits would lose it: it is a small difference of two of them."""
    model = adapted(mlp(), "0", r=4)
    with torch.no_grad():
        model[0].hra_u["default"][..., 1] *= 0.05
    identity = torch.eye(6, dtype=torch.float64)
    wanted = layer_q(model[0]) - identity
    hra_fx.save_adapter(model.to(dtype), tmp_path)
    for one in (model, hra_fx.load_adapter(mlp(), tmp_path)):
        assert relative_error(layer_q(one[0]) - identity, wanted) < torch.finfo(dtype).eps


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"apply_GS": True, "init_weights": False}], ids=str)
def test_several_ranks_are_loaded_and_replaced(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "first", "0", "3", r=3, rank_pattern={"3": 2}, **fields)
    again = hra_fx.load_adapter(mlp(), folder, is_trainable=True)
    assert [row.r for row in hra_fx.report(again)] == [3, 2]
    hra_fx.save_adapter(again, tmp_path / "again")
    same_tensors(tmp_path / "again", folder, 1e-6)
    assert (tmp_path / "again" / CONFIG_NAME).read_bytes() == (folder / CONFIG_NAME).read_bytes()
    again = adapted(mlp(), "0", "3", r=3, rank_pattern={"3": 2}, **fields)
    held = again[0].hra_u["default"]
    hra_fx.load_adapter(again, folder)
    assert again[0].hra_u["default"] is held
    if not fields:
        assert relative_error(again.eval()(X), by_oracle(folder)) < 1e-5


def test_frozen_vectors_of_0_4_are_loaded_as_plain_reflections(tmp_path: Path) -> None:
    """The file has them in front of the trained ones, in the rank of its configuration."""
    folder = saved(tmp_path, "0", r=4)
    wanted = by_oracle(folder)
    with_weights(lambda tensors: tensors.update({f"{PREFIX}0.hra_vectors": torch.ones(6, 2)}))(folder)
    model: Any = hra_fx.load_adapter(mlp(), folder, is_trainable=True)
    assert relative_error(model.eval()(X), wanted) < 1e-5


def test_an_adapter_that_diverged_is_not_saved(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0")
    model = adapted(mlp(), "0", r=2)
    with torch.no_grad():
        model[0].hra_u["default"][1, 0] = float("inf")
    before = picture(folder)
    with pytest.raises(
        CheckpointError, match=rf"adapter_model\.safetensors: '{PREFIX}0\.hra_u' is not finite\. Use a state from"
    ):
        hra_fx.save_adapter(model, folder)
    assert picture(folder) == before


def test_offloaded_vectors_are_returned_with_values(tmp_path: Path) -> None:
    folder = saved(tmp_path, "0", "3", r=4)
    model = accelerate.cpu_offload(hra_fx.load_adapter(mlp(), folder))
    assert model[0].hra_u["default"].is_meta
    state = hra_fx.get_peft_model_state_dict(model)
    torch.testing.assert_close(state, weights(folder), rtol=1e-5, atol=1e-7)


# ---- blocks in torch's `checkpoint_wrapper`, which changes the paths of modules, but not the keys of `state_dict` ----


def base() -> nn.Module:
    torch.manual_seed(0)
    blocks = [OrderedDict(up=nn.Linear(6, 6), down=nn.Linear(6, 6)) for _ in range(2)]
    return nn.Sequential(*map(nn.Sequential, blocks)).double()


def wrap(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda part: type(part) is nn.Sequential and part is not model)
    return model


@pytest.mark.parametrize("first", ["wrapped", "adapted"])
def test_wrappers_do_not_change_adapters(first: str, tmp_path: Path) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    fields: dict[str, Any] = {"target_modules": ["up"], "modules_to_save": ["down"], "bias": "all"}
    settings = hra_fx.HRAConfig(r=3, init_weights=False, **fields)
    torch.manual_seed(1)
    plain = hra_fx.transform(base(), settings)
    torch.manual_seed(1)
    model = hra_fx.transform(wrap(base()), settings) if first == "wrapped" else wrap(hra_fx.transform(base(), settings))
    for part, folder in ((plain, "plain"), (model, "model")):
        hra_fx.save_adapter(part, tmp_path / folder)
    assert picture(tmp_path / "plain") == picture(tmp_path / "model")
    wanted = plain(x)
    torch.testing.assert_close(model(x), wanted)
    randomise(model)
    assert not torch.equal(model(x), wanted)
    hra_fx.load_adapter(model, tmp_path / "plain")
    torch.testing.assert_close(model(x), wanted)
    assert [row.path for row in hra_fx.report(model).rows] == ["0.up", "1.up"]
    torch.testing.assert_close(hra_fx.fold(model)(x), wanted)
    torch.testing.assert_close(hra_fx.load_adapter(wrap(base()), tmp_path / "model")(x), wanted)


# ---- damaged files: the error names the file and the key, and the model is unchanged ----

FIRST, LAST = f"{PREFIX}0.hra_u", f"{PREFIX}3.hra_u"
HEAD, HEAD_BIAS = f"{PREFIX}3.weight", f"{PREFIX}3.bias"

# What was saved: targets, and fields of the configuration.
Saved = tuple[tuple[str, ...], dict[str, Any]]
CHAIN: Saved = (("0", "3"), {"r": 4})
WITH_HEAD: Saved = (("0",), {"r": 2, "modules_to_save": ["3"]})


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def written(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS_NAME).write_bytes(change((folder / WEIGHTS_NAME).read_bytes()))


def put(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return with_weights(lambda tensors: tensors.update({key: tensor}))


def drop(*keys: str) -> Callable[[Path], None]:
    return with_weights(lambda tensors: [tensors.pop(key) for key in keys])


NO_FILE = "no such file. Pass the folder that an adapter was saved in (in PEFT, with safe_serialization=True)."
NO_FORMAT = "truncated, damaged, or not a safetensors file"


def shape(key: str, found: object, expected: object) -> str:
    return f"{key} must have shape {expected}, got {found}."


#: What was saved, how it is damaged, and the message, which starts with the file of the weights.
WEIGHTS: dict[str, tuple[Saved, Callable[[Path], object], str]] = {
    "no weights": (CHAIN, without(WEIGHTS_NAME), NO_FILE),
    "cut short": (CHAIN, written(lambda whole: whole[:-7]), NO_FORMAT),
    "a pointer of git-lfs": (CHAIN, written(lambda _: b"version https://git-lfs.github.com/spec/v1"), NO_FORMAT),
    # the vectors
    "width": (CHAIN, put(LAST, torch.ones(6, 4)), shape(LAST, (6, 4), (8, 4))),
    "nan": (
        CHAIN,
        with_weights(lambda tensors: tensors[LAST][1, :2].fill_(float("nan"))),
        f"'{LAST}' is not finite",
    ),
    "zeros": (
        CHAIN,
        with_weights(lambda tensors: tensors[LAST][:, 1].zero_()),
        f"{LAST} has a vector of zeros, which has no direction to reflect. The file is damaged: save or download the",
    ),
    "integers": (CHAIN, put(LAST, torch.ones(8, 4, dtype=torch.int32)), f"{LAST} has dtype torch.int32, but vectors"),
    "booleans": (CHAIN, put(LAST, torch.ones(8, 4).bool()), f"{LAST} has dtype torch.bool, but vectors"),
    "complex": (CHAIN, put(LAST, torch.ones(8, 4, dtype=torch.complex64)), f"{LAST} has dtype torch.complex64, but"),
    "many unexpected": (
        CHAIN,
        with_weights(lambda tensors: tensors.update({f"{PREFIX}deeper.{i}.hra_u": torch.ones(6, 4) for i in range(7)})),
        ", ".join(f"{PREFIX}deeper.{i}.hra_u" for i in range(5)) + " and 2 more.",
    ),
    # modules to save
    "no head": (WITH_HEAD, drop(HEAD, HEAD_BIAS), f"missing keys {HEAD_BIAS}, {HEAD}."),
    # a configuration that does not match the weights
    "another rank": (CHAIN, with_config(r=8), shape(FIRST, (6, 4), (6, 8))),
    "fewer targets": (
        CHAIN,
        with_config(target_modules=["0"]),
        f"unexpected keys {LAST}. Was the adapter trained on another base model, or its configuration edited?",
    ),
}
#: Name, what was saved, how it is damaged, the named file, the message, the type of the error.
DAMAGES: dict[str, tuple[Saved, Callable[[Path], object], str, str, type[Exception]]] = {
    **{name: (before, act, WEIGHTS_NAME, text, CheckpointError) for name, (before, act, text) in WEIGHTS.items()},
    "no rank": (CHAIN, with_config(r=0), CONFIG_NAME, "`r` must be a positive int, got 0.", ConfigError),
    "no configuration": (CHAIN, without(CONFIG_NAME), CONFIG_NAME, NO_FILE, CheckpointError),
    "other targets": (
        CHAIN,
        with_config(target_modules=["query"]),
        "",
        "the configuration does not fit Sequential: `target_modules=['query']` matches no module of Sequential",
        CheckpointError,
    ),
}
#: Each damaged adapter is loaded into one kind of model, in turn.
CASES = [*zip(DAMAGES, itertools.cycle(MODELS), strict=False)]


@pytest.mark.parametrize(("name", "state"), CASES)
def test_damage_is_refused_and_leaves_the_model_unchanged(name: str, state: str, tmp_path: Path) -> None:
    (targets, fields), damage, file, reason, kind = DAMAGES[name]
    whole = saved(tmp_path / "whole", *targets, **fields)
    folder = shutil.copytree(whole, tmp_path / "damaged")
    damage(folder)
    model = MODELS[state](whole)
    with refuses(model, f"^{re.escape(f'{folder / file}: ')}", kind) as caught:
        hra_fx.load_adapter(model, folder, is_trainable=True)
    assert type(caught.value) is kind and reason in str(caught.value)
    hra_fx.load_adapter(model, whole)
