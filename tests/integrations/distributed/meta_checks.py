"""Models that are built and adapted on the meta device, sharded, and then given memory, weights and starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.distributed.spawned import Check
from integrations.distributed.trained import CASES, F64, SHARDED, Case, output, part_of, same, train, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

import hra_fx
from hra_fx.errors import AdapterError

SEED = 7
NAMES = [
    *("mlp, whole", "mlp, odd rank", "mlp, Gram-Schmidt", "mlp, copies", "convolutions", "attention", "llama"),
]


def settings(case: Case) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**{"r": 4, **case.config})


def eager(case: Case) -> nn.Module:
    """What one process with memory for everything gets."""
    base = case.base()
    torch.manual_seed(SEED)
    return hra_fx.transform(base, settings(case))


def sharded_on_meta(case: Case, wrap: Callable[[Case, nn.Module], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        model = case.make().to(F64)
    return wrap(case, hra_fx.transform(model, settings(case)))


def with_weights(model: nn.Module, case: Case, rank: int, *, broadcast: bool) -> nn.Module:
    """Memory and the weights of the base model, which one process or all have."""
    model.to_empty(device="cpu")
    base = case.base()
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, base.state_dict() if rank == 0 or not broadcast else {}, options=options)
    saved = base.state_dict()
    for name, buffer in base.named_buffers():
        if name not in saved:  # the frequencies of rotary embeddings, and positions
            path, _, entry = name.rpartition(".")
            model.get_submodule(path).register_buffer(entry, buffer, persistent=False)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in model.state_dict().items()}


def starts_and_training(name: str, rank: int, folder: Path) -> None:
    case = CASES[name]
    wanted = eager(case).state_dict()
    alone = eager(case)
    losses = train(alone, case)
    for way, wrap in SHARDED.items():
        for broadcast in (False, True):
            model = with_weights(sharded_on_meta(case, wrap), case, rank, broadcast=broadcast)
            torch.manual_seed(SEED + rank)  # the random numbers are those of the first process
            hra_fx.reset_adapters(model)
            found = whole(model)
            assert found.keys() == wanted.keys(), way
            assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], way
        assert train(model, case, part_of(rank)) == pytest.approx(losses, abs=1e-13), way
        same(trained(alone), trained(model))
        hra_fx.save_adapter(case.model(), folder / f"{way} {rank}")
        model = with_weights(sharded_on_meta(case, wrap), case, rank, broadcast=False)
        hra_fx.load_adapter(model, folder / f"{way} {rank}")
        assert (output(model, case) - output(case.model(), case)).abs().max() < 1e-13, way


def without_memory(rank: int, folder: Path) -> None:
    case = CASES["mlp, odd rank"]
    saved = case.model()
    hra_fx.save_adapter(saved, folder / str(rank))
    model = sharded_on_meta(case, SHARDED["FSDP2, whole"])
    calls: list[Callable[[], Any]] = [
        lambda: hra_fx.reset_adapters(model),
        lambda: hra_fx.reset_adapters(model, device="cpu"),
        lambda: hra_fx.load_adapter(model, folder / str(rank)),
    ]
    for call in calls:
        with pytest.raises(
            AdapterError, match=r"^0: its vectors are sharded and on the meta device\. Call model\.to_e"
        ):
            call()
    assert all(parameter.is_meta for parameter in model.parameters())
    with_weights(model, case, rank, broadcast=False)
    assert output(model, case).isnan().all(), "vectors that nothing has filled"


def report_of_this_rank(rank: int, folder: Path) -> None:
    """FSDP2 splits the first dimension in chunks; 9 rows are 5 and 4."""
    model = nn.Sequential(nn.Linear(9, 4, dtype=F64), nn.Linear(4, 2, dtype=F64)).to("meta")
    hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
    SHARDED["FSDP2, whole"](CASES["mlp, whole"], model)
    for _ in range(2):
        (row,) = hra_fx.report(model)
        rows = 5 - rank
        assert (row.parameters, row.bytes, row.bytes_here) == (18, 144, rows * 2 * 8)
        text = f"1 adapted layer, 18 adapter parameters (144 bytes; {rows * 2} and {rows * 16} bytes on this rank)"
        assert text in str(hra_fx.report(model))
        model.to_empty(device="cpu")


CHECKS: dict[str, Check] = {
    **{f"starts and training: {name}": functools.partial(starts_and_training, name) for name in NAMES},
    **{"without memory": without_memory, "report of this rank": report_of_this_rank},
}
