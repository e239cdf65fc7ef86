"""What holds however several processes share a model: they compute, train and write what one process does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from integrations.distributed.trained import CASES, EXPERTS, WAYS, Case, output, same, train, trained
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import hra_fx


def term(model: nn.Module) -> Any:
    return 0.1 * hra_fx.orthogonality_loss(model)


#: Arguments of `train`.
PLAIN: dict[str, Any] = {}
EVERY: tuple[dict[str, Any], ...] = (
    *(PLAIN, {"pairs": True, "quiet": 2}, {"protect": 2}, {"term": term}, {"evaluate": True}),
    {"compiled": True},
)


@dataclass(frozen=True)
class Way:
    """A case, and how processes share its model.

    Attributes:
        case: the case.
        make: the model, in every process.
        part: what this process trains on of each batch.
        trainings: arguments of `train`.
        within: largest difference of a loss or a trained value.
    """

    case: Case
    make: Callable[[], nn.Module]
    part: slice = field(default_factory=lambda: slice(None))
    trainings: tuple[dict[str, Any], ...] = (PLAIN,)
    within: float = 1e-12


def data_parallel(name: str, way: str, trainings: tuple[dict[str, Any], ...] = (PLAIN,)) -> Way:
    case = EXPERTS if name == "experts" else CASES[name]
    part = slice(distributed.get_rank(), None, distributed.get_world_size())
    return Way(case, lambda: WAYS[way](case, case.model()), part, trainings, within=1e-13)


def turned_away(model: nn.Module) -> nn.Module:
    """With other vectors, which a load has to replace."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.5).add_(0.1)
    return model


def close(model: nn.Module, case: Case, wanted: torch.Tensor) -> bool:
    return bool((output(model, case) - wanted).abs().max() < 1e-13)


def losses_and_vectors(ways: Mapping[str, Way], rank: int, folder: Path) -> None:
    # TorchDynamo breaks the graph at the hooks of a group, and reads it of what it finds there.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    for name, way in ways.items():
        for training in way.trainings:
            options = {key: value for key, value in training.items() if key != "compiled"}
            alone, together = way.case.model(), way.make()
            losses = train(alone, way.case, **options)
            run = torch.compile(together, backend="aot_eager") if "compiled" in training else together
            found = train(run, way.case, way.part, **options)
            assert found == pytest.approx(losses, abs=way.within), (name, training)
            same(trained(alone), trained(together), within=way.within)


def files(ways: Mapping[str, Way], rank: int, folder: Path) -> None:
    for number, (name, way) in enumerate(ways.items()):
        case, wanted, place = way.case, output(way.case.model(), way.case), folder / str(number)
        hra_fx.save_adapter(way.make(), place)
        distributed.barrier()
        alone = folder / f"{number} alone {rank}"
        hra_fx.save_adapter(case.model(), alone)
        assert (place / "adapter_config.json").read_text() == (alone / "adapter_config.json").read_text()
        same(load_file(place / "adapter_model.safetensors"), load_file(alone / "adapter_model.safetensors"))
        assert close(hra_fx.load_adapter(case.base(), place), case, wanted), name
        other = turned_away(way.make())
        assert not close(other, case, wanted), name
        assert close(hra_fx.load_adapter(other, place, is_trainable=True), case, wanted), name
        train(other, case, way.part, steps=1)
        assert not close(other, case, wanted), name


def checkpoints(ways: Mapping[str, Way], rank: int, folder: Path) -> None:
    """All of the state, that of the adapter alone, and all of it in each process."""
    for number, (name, way) in enumerate(ways.items()):
        case, wanted = way.case, output(way.case.model(), way.case)
        for part in ("whole", "adapter"):
            options, place = StateDictOptions(ignore_frozen_params=part == "adapter"), folder / f"{number} {part}"
            model = way.make()
            state = get_model_state_dict(model, options=options)
            own = {key.removeprefix("module.") for key, p in model.named_parameters() if p.requires_grad}
            assert part == "whole" or {key for key in state if not key.endswith("_anchor")} == own
            dcp.save(state, checkpoint_id=place)
            other = turned_away(way.make())
            into = get_model_state_dict(other, options=options)
            dcp.load(into, checkpoint_id=place)
            set_model_state_dict(other, into, options=StateDictOptions(strict=part == "whole"))
            assert close(other, case, wanted), (name, part)
        full = StateDictOptions(full_state_dict=True)
        plain, other = turned_away(case.model()), turned_away(way.make())
        plain.load_state_dict(get_model_state_dict(model, options=full))
        assert close(plain, case, wanted), name
        set_model_state_dict(other, plain.state_dict(), options=full)
        assert close(other, case, wanted), name


def as_lora(ways: Mapping[str, Way], rank: int, folder: Path) -> None:
    """Gathered layer by layer; the first process writes."""
    for number, (name, way) in enumerate(ways.items()):
        alone = hra_fx.save_as_lora(way.case.model(), folder / f"{number} alone {rank}")
        wanted = load_file(alone.path / "adapter_model.safetensors")
        model = way.make()
        parameters = dict(model.named_parameters())
        result = hra_fx.save_as_lora(model, folder / str(number))
        assert result.rows == alone.rows, name
        found = load_file(result.path / "adapter_model.safetensors")
        assert all(p is parameters[key] for key, p in model.named_parameters())
        assert close(model, way.case, output(way.case.model(), way.case)), name
        for tensors in (found, hra_fx.convert_to_lora(model)[1]):  # then from what a forward has gathered
            assert tensors.keys() == wanted.keys()
            assert all(torch.equal(tensors[key], wanted[key]) for key in wanted), name
