"""`hra-fx scale`: the cost of adapters in distributed training, from the model's `config.json` alone."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.options import Json
from hra_fx.cli.screen import show_heading, show_json, show_table
from hra_fx.reporting.table import Column

if TYPE_CHECKING:
    from hra_fx.reporting.scale import Cost

EXAMPLES = (
    "hra-fx scale my-model --gpus 8",
    "hra-fx scale my-model --gpus 64 --strategy fsdp2 --target q_proj --target v_proj --rank 16",
    "hra-fx scale my-model --gpus 8 --strategy tp --tokens 8192",
)


class StrategyName(StrEnum):
    """How training is distributed."""

    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero3 = "zero3"
    tp = "tp"


def scale(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a model, or its config.json.")],
    gpus: Annotated[int, typer.Option("--gpus", "-n", min=1, help="Number of processes.")] = 8,
    strategy: Annotated[
        StrategyName, typer.Option("--strategy", "-s", help="How training is distributed.")
    ] = StrategyName.fsdp2,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", metavar="NAME", help="A layer, by the end of its path. Default: all linear."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Number of reflections.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens per step and process, for tp.")] = 4096,
    as_json: Json = False,
) -> None:
    """Show memory and communication of adapters per process and training step, compared with LoRA.

    The model is built from its config.json, without weights, and is not run. The values come from formulas, which are
    tested against measurements with two processes. Vectors are float32, and the optimizer is AdamW.
    """
    import torch

    from hra_fx.api.transform import transform
    from hra_fx.cli.building import build
    from hra_fx.config import HRAConfig
    from hra_fx.reporting.scale import costs

    model, library = build(path)
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    if isinstance(dtype, torch.dtype):  # the model computes in the dtype of the checkpoint
        model.to(dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    title = f"{type(model).__name__} ({library}), {parameters:,} parameters"
    transform(model, HRAConfig(r=rank, target_modules=target or "all-linear"))
    found = costs(model, gpus, strategy.value, tokens=tokens)
    if as_json:
        show_json(found)
        return
    show_heading(title, {"processes": str(gpus), "strategy": strategy.value})
    names = [f"{cost.method}, r = {cost.rank}" for cost in found]
    show_table([Column("per process", is_text=True), *map(Column, names)], _rows(found))


def _rows(found: list[Cost]) -> list[list[str]]:
    from rich.filesize import decimal

    rows = [["trainable parameters (total)", *(f"{cost.parameters:,}" for cost in found)]]
    for field in ("vectors", "gradients", "optimizer", "factors"):
        rows.append([field, *(decimal(getattr(cost, field)) for cost in found)])
    rows.append(["collectives per step", *(f"{cost.collectives:,}" for cost in found)])
    rows.append(["sent per step", *(decimal(cost.sent) for cost in found)])
    return rows
