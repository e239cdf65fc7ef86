"""DDP and FSDP2 in transformers' Trainer, which accelerate prepares, against one process."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from integrations.distributed.spawned import Check
from integrations.distributed.trained import F64, PROJECTIONS, llama, same
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import hra_fx


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """A block in which accelerate's FSDP works on CPUs, with all of its own code but the look at the devices.

    `AcceleratorState` turns the kinds of distribution over accelerators into FSDP, and not that over CPUs.
    """
    own, environment = AcceleratorState.__init__, dict(os.environ)

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", __init__)
        try:
            yield
        finally:  # forget what accelerate keeps in the process: its state, and variables
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.clear()
            os.environ.update(environment)


def tokens() -> torch.Tensor:
    """Four batches of eight, all of them different."""
    return torch.randint(0, 19, (32, 6), generator=torch.Generator().manual_seed(2))


def of_peft(base: nn.Module, config: hra_fx.HRAConfig) -> nn.Module:
    own = peft.HRAConfig(r=config.r, target_modules=config.target_modules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers has renamed
        model: Any = peft.get_peft_model(base, own)
    model.to(F64)
    hra_fx.from_peft(model)
    return model


Make: TypeAlias = Callable[[nn.Module, hra_fx.HRAConfig], nn.Module]


def made(make: Make) -> Any:
    torch.manual_seed(0)
    return make(llama().to(F64), hra_fx.HRAConfig(r=4, **PROJECTIONS))


def trainer_of(make: Make, folder: Path, count: int, fsdp: dict[str, Any]) -> Trainer:
    """Each of two processes gets half of a batch, and under DDP in two parts, and samples of its own to keep."""
    parts = 1 if fsdp else 2
    more = {"fsdp": True, "fsdp_config": {"version": 2, **fsdp}} if fsdp else {}
    arguments = TrainingArguments(
        **{"output_dir": str(folder), "max_steps": count, "per_device_train_batch_size": 4 // parts},
        **{"learning_rate": 0.01, "gradient_accumulation_steps": parts},
        **{"lr_scheduler_type": "constant", "max_grad_norm": 0.01, "use_cpu": True, "report_to": [], "save_steps": 2},
        **{"logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False},
        **{"train_sampling_strategy": "sequential", **more},
    )
    items: Any = [{"input_ids": row, "labels": row} for row in tokens()]
    trainer = Trainer(made(make), arguments, train_dataset=items)
    if not fsdp:
        hra_fx.add_distance_to_base(trainer, list(KEPT), weight=0.5)
    return trainer


def by_hand(make: Make, *, distance: bool) -> Any:
    model = made(make)
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0)
    for batch in tokens().split(8):
        loss = model(input_ids=batch, labels=batch).loss
        (loss + 0.5 * hra_fx.distance_to_base(model, KEPT.flatten(0, 1)) if distance else loss).backward()
        torch.nn.utils.clip_grad_norm_(vectors, 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return model


#: A batch of samples for each process.
KEPT = torch.arange(8).view(2, 2, 2)
FILES = {"adapter_config.json", "adapter_model.safetensors"}


def with_trainer(make: Make, fsdp: dict[str, Any], rank: int, folder: Path) -> None:
    """Two steps and a checkpoint, and two more in a new Trainer, are four steps of one process."""
    wanted = by_hand(make, distance=not fsdp)
    if rank == 0:
        wanted.save_pretrained(folder / "wanted")
    for count in (2, 4):
        with fsdp_on_cpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of PEFT and of the Trainer
            trainer = trainer_of(make, folder / "out", count, fsdp)
            trainer.train(resume_from_checkpoint=count == 4)
            assert trainer.accelerator.is_fsdp2 is bool(fsdp)
            assert isinstance(trainer.model_wrapped, DistributedDataParallel) is not bool(fsdp)
            trainer.save_model(str(folder / f"final-{count}"))
            if make is not of_peft:
                hra_fx.save_adapter(trainer.model, folder / f"own-{count}")
            distributed.barrier()
            # With state_dict_type="SHARDED_STATE_DICT", the Trainer saves shards in checkpoints, and no model.
            files = {path.name for path in (folder / f"final-{count}").glob("adapter*")}
            assert files == (set() if fsdp.get("state_dict_type") == "SHARDED_STATE_DICT" else FILES)
            saved = folder / (f"final-{count}" if files else f"own-{count}")
    same(*(load_file(place / "adapter_model.safetensors") for place in (folder / "wanted", saved)), within=1e-9)


BY_BLOCK = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "activation_checkpointing": "true"}
WHOLE = {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": "true"}
CHECKS: dict[str, Check] = {
    f"Trainer: {make.__name__}, {fsdp.get('state_dict_type', 'DDP')}": functools.partial(with_trainer, make, fsdp)
    for make, fsdp in [
        (hra_fx.transform, {}),
        (hra_fx.get_peft_model, {"state_dict_type": "SHARDED_STATE_DICT", **BY_BLOCK}),
        (hra_fx.transform, WHOLE),
        (of_peft, WHOLE),
    ]
}
