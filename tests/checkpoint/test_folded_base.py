"""A base model that already contains an adapter is refused; any other base model is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hra_fx
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.lora.save import convert_files

Case = tuple[nn.Module, dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: (nn.Linear(24, 16), {}),
    "linear, Gram-Schmidt": lambda: (nn.Linear(24, 16).bfloat16(), {"apply_GS": True, "init_weights": False}),
    "conv": lambda: (nn.Conv2d(4, 16, 3).bfloat16(), {}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A model of one layer, and fields of the configuration."""
    layer, fields = CASES[request.param]()
    return nn.Sequential(layer), fields


def adapted(base: nn.Module, **fields: Any) -> nn.Module:
    """A trained adapter that changes the weights by some percent."""
    config = hra_fx.HRAConfig(**{"r": 3, "target_modules": ["0"], **fields})
    model = hra_fx.transform(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def on_disk(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def load(model: nn.Module, adapter: Path, folder: Path) -> None:
    hra_fx.load_adapter(model, adapter)


def fold(model: nn.Module, adapter: Path, folder: Path) -> None:
    hra_fx.fold_checkpoint(on_disk(model, folder / "base"), adapter, folder / "out")


def convert(model: nn.Module, adapter: Path, folder: Path) -> None:
    convert_files([adapter], on_disk(model, folder / "base"), folder / "out")


@pytest.mark.parametrize("use", [load, fold, convert])
def test_a_folded_base_is_refused(use: Callable[[nn.Module, Path, Path], None], case: Case, tmp_path: Path) -> None:
    base, fields = case
    model = adapted(base, **fields)
    hra_fx.save_adapter(model, tmp_path / "adapter")
    folded = hra_fx.fold(model)
    with pytest.raises(
        CheckpointError, match=r"already contains the adapter .*very similar one, folded into its weights \(seen in 0\)"
    ):
        use(folded, tmp_path / "adapter", tmp_path)
    assert not (tmp_path / "out").exists()
    assert [name for name, _ in folded.named_modules()] == ["", "0"]


@pytest.mark.parametrize("other", ["the same", "another dtype", "another model", "another adapter folded"])
def test_other_bases_are_not_refused(other: str, case: Case, tmp_path: Path) -> None:
    base, fields = case
    hra_fx.save_adapter(adapted(base, **fields), tmp_path / "adapter")
    if other == "another dtype":
        base = base.to(torch.float16)
    elif other == "another model":
        nn.init.normal_(base[0].weight)
    elif other == "another adapter folded":
        base = hra_fx.fold(adapted(base, **fields))
    for use in (load, fold, convert):
        if use is convert and isinstance(base[0], nn.Conv2d):
            continue  # needs a config.json to know the padding and groups
        (tmp_path / use.__name__).mkdir()
        use(copy.deepcopy(base), tmp_path / "adapter", tmp_path / use.__name__)


def test_a_fresh_adapter_fits_its_own_folded_base_and_a_merged_one_does_not(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(24, 16))
    fresh = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=3, target_modules=["0"]))
    hra_fx.save_adapter(fresh, tmp_path)
    hra_fx.load_adapter(hra_fx.fold(fresh), tmp_path)
    merged = adapted(base)
    hra_fx.merge_adapter(merged)
    hra_fx.save_adapter(merged, tmp_path)
    hra_fx.load_adapter(base, tmp_path)
    with pytest.raises(CheckpointError, match="This Sequential already contains the adapter"):
        hra_fx.load_adapter(hra_fx.fold(merged), tmp_path)


def test_the_row_is_of_the_layer_that_is_rotated_most(tmp_path: Path) -> None:
    """Layers before it may not have learned anything, or have a first row of zeros."""
    base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)))
    base[1].weight.data[0] = 0
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=4, target_modules=["0", "1", "2"]))
    for layer in (model[1], model[2]):
        layer.hra_u["default"].data.add_(torch.randn(24, 4), alpha=0.05)
    hra_fx.save_adapter(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"\(seen in 2\)"):
        hra_fx.load_adapter(hra_fx.fold(model), tmp_path)


@pytest.mark.parametrize("use", [fold, convert])
def test_files_of_peft_have_the_name_of_the_base_only(
    use: Callable[[nn.Module, Path, Path], None], tmp_path: Path
) -> None:
    base = nn.Sequential(nn.Linear(24, 16))
    for name in ("org/base", "org/other"):
        config = peft.HRAConfig(r=4, target_modules=["0"])
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    (tmp_path / "same").mkdir()
    use(base, tmp_path / "org/base", tmp_path / "same")  # the folder is called "base"
    for place in ("link", "v2"):
        (tmp_path / place).mkdir()
    (tmp_path / "link" / "base").symlink_to(tmp_path / "v2")
    use(base, tmp_path / "org/base", tmp_path / "link")
    with pytest.warns(HRAWarning, match=r"was trained on 'org/other', but this model is '.*base'. Make sure"):
        use(base, tmp_path / "org/other", tmp_path)
