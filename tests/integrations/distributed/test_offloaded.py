"""accelerate's offloading after `transform`: a model runs as before, and what the next call would lose is refused.

Before `transform` it is refused in `tests/selection/test_eligibility.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from integrations.distributed.trained import CASES, Case, output
from torch import nn

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError

CPU = torch.device("cpu")


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """The first part on the disk, the others in place, with hooks all the same."""
    places = dict.fromkeys((name for name, _ in model.named_children()), "cpu")
    places[next(iter(places))] = "disk"
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)
    return model


OFFLOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "CPU": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "device map": dispatched,
}
MODELS = ["mlp, Gram-Schmidt", "mlp, copies", "convolutions", "llama", "bert"]
EVERY = [(name, "CPU") for name in MODELS] + [("mlp, whole", "disk"), ("llama", "disk"), ("llama", "device map")]
MLP = CASES["mlp, whole"]


def offloaded(case: Case, way: str, folder: Path) -> nn.Module:
    model = case.model().eval()
    OFFLOADS[way](model, folder)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.parametrize(("name", "way"), EVERY)
def test_a_model_runs_as_before(name: str, way: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = output(case.model().eval(), case)
    model = offloaded(case, way, tmp_path)
    for _ in range(2):
        assert (output(model, case) - wanted).abs().max() < 1e-13
    if name != "mlp, copies":
        with hra_fx.disable_adapters(model):
            assert (output(model, case) - output(case.base().eval(), case)).abs().max() < 1e-13
        hra_fx.delete_adapter(model, "default")
        assert (output(model, case) - output(case.base().eval(), case)).abs().max() < 1e-13


@pytest.mark.parametrize("way", OFFLOADS)
def test_what_would_be_lost_is_refused_and_the_way_out_works(way: str, tmp_path: Path) -> None:
    wanted = output(MLP.model(), MLP)
    hra_fx.save_adapter(MLP.model(), tmp_path / "adapter")
    model = offloaded(MLP, way, tmp_path / "offload")
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.save_adapter(model, tmp_path / "other")),
        (AdapterError, lambda: hra_fx.load_adapter(model, tmp_path / "adapter")),
        (AdapterError, lambda: hra_fx.set_scale(model, "default", 0.5)),
        (AdapterError, lambda: hra_fx.orthogonality_loss(model)),
        (FoldError, lambda: hra_fx.fold(model)),
        (FoldError, lambda: hra_fx.merge_adapter(model)),
    ]
    message = r"^0: accelerate offloads its weight or its vectors between calls.*remove_hook_from_submodules\(model\)"
    for kind, call in calls:
        with pytest.raises(kind, match=message):
            call()
    with pytest.raises(UnsupportedLayerError, match="accelerate put a hook on it, which moves its weights"):
        hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, target_modules=["0"]))
    assert hra_fx.report(model).rows[0].rotation != hra_fx.report(model).rows[0].rotation  # NaN
    assert (output(model, MLP) - wanted).abs().max() < 1e-13
    accelerate.hooks.remove_hook_from_submodules(model)
    hra_fx.save_adapter(model, tmp_path / "other")
    hra_fx.load_adapter(model, tmp_path / "adapter")
    assert (output(hra_fx.fold(model), MLP) - wanted).abs().max() < 1e-13


def test_combining_vectors_that_are_elsewhere_is_refused(tmp_path: Path) -> None:
    model = MLP.model()
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, target_modules=["0"]))
    OFFLOADS["CPU"](model, tmp_path)
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=r"^0: accelerate offloads its weight or its vectors between calls"):
        hra_fx.combine(model, ["default", "b"], "both")
    assert list(model.state_dict()) == before


def test_an_adapter_of_an_offloaded_transformers_model_is_refused_too(tmp_path: Path) -> None:
    model: object = offloaded(CASES["llama"], "CPU", tmp_path)
    with pytest.raises(AdapterError, match="accelerate offloads its weight"):
        model.save_pretrained(tmp_path / "adapter")  # type: ignore[attr-defined]


def test_a_model_that_is_moved_as_a_whole_can_be_folded(tmp_path: Path) -> None:
    """`cpu_offload_with_hook` moves modules, and leaves no tensor without data."""
    wanted = output(MLP.model(), MLP)
    model = MLP.model()
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)
    assert (output(model, MLP) - wanted).abs().max() < 1e-13
    assert (output(hra_fx.fold(model), MLP) - wanted).abs().max() < 1e-13
