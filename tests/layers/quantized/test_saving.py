"""Adapters over quantized weights are saved and loaded as over any; whole models as far as their libraries go."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import peft
import pytest
import torch
from layers.quantized.bases import FEW, SCHEMES, adapted, config, dense, inputs, plain, quantized
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_fx

PLAIN_STATES = [name for name in FEW if name != "bnb nf4"]


@pytest.mark.parametrize("scheme", FEW)
def test_the_file_is_that_of_peft_over_plain_weights(scheme: str, tmp_path: Path) -> None:
    hra_fx.save_adapter(adapted(scheme), tmp_path / "ours")
    theirs = peft.get_peft_model(plain(), peft.HRAConfig(r=4, target_modules=["0", "2"]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, due = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {key: (t.shape, t.dtype) for key, t in due.items()}
    over_plain = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours")
    loaded = hra_fx.load_adapter(plain(), tmp_path / "ours")
    assert relative_error(over_plain(inputs()), loaded(inputs())) < 1e-5


@pytest.mark.parametrize("scheme", FEW)
def test_an_adapter_is_loaded_over_a_quantized_base(scheme: str, tmp_path: Path) -> None:
    model, x = adapted(scheme), inputs()
    hra_fx.save_adapter(model, tmp_path)
    loaded = hra_fx.load_adapter(quantized(scheme), tmp_path, is_trainable=True)
    assert torch.equal(loaded.train()(x), model.train()(x))
    empty = hra_fx.transform(quantized(scheme), config(), low_cpu_mem_usage=True)
    assert empty[0].hra_u["default"].is_meta
    hra_fx.load_adapter(empty, tmp_path, is_trainable=True)
    assert torch.equal(empty.train()(x), model(x))


@pytest.mark.parametrize("scheme", PLAIN_STATES)
def test_a_state_dict_goes_round(scheme: str) -> None:
    model, other = adapted(scheme), hra_fx.transform(quantized(scheme), config())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # Python 3.11.2 pickles torchao's enumerations in a way that torch.load takes for code.
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(other.train()(inputs()), model.train()(inputs()))


def test_a_state_of_four_bits_is_one_that_bitsandbytes_does_not_load() -> None:
    """So it is without adapters; the adapter alone is loaded from it, or from its own file."""
    base, state = quantized("bnb nf4"), adapted("bnb nf4").state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.weight.absmax\""):
        base.load_state_dict(base.state_dict())
    model = hra_fx.transform(base, config())
    missing, unexpected = model.load_state_dict({k: v for k, v in state.items() if ".hra_u." in k}, strict=False)
    assert not unexpected and not any(".hra_u." in key for key in missing)
    assert relative_error(model(inputs()), dense(adapted("bnb nf4"), inputs())) < SCHEMES["bnb nf4"].tolerance


@pytest.mark.parametrize("scheme", ["bnb int8", "bnb nf4"])
def test_a_whole_model_is_pickled(scheme: str) -> None:
    model = adapted(scheme)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.train()(inputs()), model.train()(inputs()))


@pytest.mark.parametrize("scheme", ["bnb nf4", "ao int8 dynamic"])
def test_reports_and_pictures(scheme: str, tmp_path: Path) -> None:
    model = adapted(scheme)
    rows = hra_fx.report(model).rows
    assert [(row.path, row.d, row.r) for row in rows] == [("0", 64, 4), ("2", 128, 4)]
    assert all(row.rotation > 1 for row in rows)
    for ending in ("svg", "html", "mmd", "dot", "graphml"):
        hra_fx.visualize(model, tmp_path / f"adapters.{ending}")
        assert (tmp_path / f"adapters.{ending}").stat().st_size
    (graph,) = hra_fx.graphs(model).values()
    assert torch.equal(graph(inputs()), model(inputs()))


class Branching(nn.Module):
    """fx cannot trace it."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.shape[0] < 100 else x[:100])


def test_a_call_is_drawn() -> None:
    model = Branching(adapted("ao int8"))
    boxes = [(data["name"], data["kind"]) for _, data in hra_fx.to_networkx(model, inputs()).nodes(data=True)]
    kinds = ["input", "adapted_layer", "module", "adapted_layer", "output"]
    assert boxes == list(zip(["x", "layers.0", "layers.1", "layers.2", "output"], kinds, strict=True))
