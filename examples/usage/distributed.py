"""Train with DDP and FSDP2 in two processes, and compare the losses with those of one process.

It starts two processes by itself, and also runs under a launcher:

    torchrun --nproc-per-node 2 examples/usage/distributed.py
    accelerate launch --multi_gpu --num_processes 2 examples/usage/distributed.py

The second command calls torchrun and also works on CPUs. With `--cpu` and without MPI, accelerate starts one process
whatever `--num_processes` is, and this program then starts two by itself.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hra_fx

ADAPTER = StateDictOptions(ignore_frozen_params=True)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def base() -> nn.Sequential:
    torch.manual_seed(0)  # the same in every process
    return nn.Sequential(nn.Linear(8, 16), Block(16), Block(16), nn.Linear(16, 3))


def adapted() -> nn.Sequential:
    return hra_fx.transform(base(), hra_fx.HRAConfig(r=4, target_modules=["up", "down"]))  # adapt first, then wrap


def sharded() -> nn.Module:
    model = adapted()
    for block in model[1:3]:
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, part: slice = slice(None)) -> list[float]:
    """Train on a part of each batch; return the losses of the whole batch."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    losses = []
    for _ in range(10):
        loss = cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if part != slice(None):
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        losses.append(float(mean))
    return losses


def compare(folder: str) -> list[str]:
    """Run in every process."""
    part = slice(distributed.get_rank(), None, distributed.get_world_size())
    members: list[tuple[int, int]] = [(0, 0)] * distributed.get_world_size()
    distributed.all_gather_object(members, (distributed.get_rank(), os.getpid()))
    ranks, processes = zip(*members, strict=True)
    lines = [f"one group: ranks {ranks} in {len(set(processes))} processes"]

    alone = train(adapted())
    lines.append(f"one process: {alone[0]:.4f} -> {alone[-1]:.4f}")

    averaging = DistributedDataParallel(adapted())
    difference = max(abs(a - b) for a, b in zip(alone, train(averaging, part), strict=True))
    lines.append(f"DDP, largest difference of a loss: {difference:.1e}")

    sharing = sharded()
    difference = max(abs(a - b) for a, b in zip(alone, train(sharing, part), strict=True))
    lines.append(f"FSDP2, largest difference of a loss: {difference:.1e}")

    # Every process calls it, and the first one writes. Under DDP one call is enough.
    hra_fx.save_adapter(sharing, Path(folder, "adapter"))
    loaded = hra_fx.load_adapter(base(), Path(folder, "adapter"))
    x = torch.ones(1, 8)
    lines.append(f"the file, loaded into a plain model: {(loaded(x) - sharing(x)).abs().max():.1e}")

    # A sharded checkpoint of the adapter, without the frozen parameters.
    dcp.save(get_model_state_dict(sharing, options=ADAPTER), checkpoint_id=Path(folder, "shards"))
    resumed = sharded()
    state = get_model_state_dict(resumed, options=ADAPTER)
    dcp.load(state, checkpoint_id=Path(folder, "shards"))
    set_model_state_dict(resumed, state, options=StateDictOptions(strict=False))
    lines.append(f"the shards, {len(state)} of them, loaded again: {(resumed(x) - sharing(x)).abs().max():.1e}")
    return lines


def worker(rank: int, folder: str) -> None:
    meeting = f"file://{folder}/meeting"  # a file instead of a port, which may be in use
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    lines = compare(folder)
    if rank == 0:
        Path(folder, "lines").write_text("\n".join(lines))
    leave()


def leave() -> None:
    """Wait for all processes, and release the wrappers that hold the process group, before it is destroyed."""
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


def launched() -> None:
    distributed.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        distributed.broadcast_object_list(folder)  # the folder of rank 0
        lines = compare(folder[0])
        if distributed.get_rank() == 0:
            print("started by a launcher", *lines, sep="\n")
        leave()


def main() -> None:
    if "RANK" in os.environ:  # torchrun sets it
        launched()
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (folder,), nprocs=2)
        print("started by this program", Path(folder, "lines").read_text(), sep="\n")


if __name__ == "__main__":
    main()
