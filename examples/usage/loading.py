"""Save an adapter, load it into a new base model, and continue training. PEFT reads and writes the same files."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import hra_fx


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 16)
    config = hra_fx.HRAConfig(r=4, apply_GS=True, target_modules=["0"], modules_to_save=["2"])
    model = hra_fx.transform(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory, "adapter")
        hra_fx.save_adapter(model, folder)
        for file in sorted(folder.iterdir()):
            print(f"{file.name}: {file.stat().st_size} bytes")

        loaded = hra_fx.load_adapter(copy.deepcopy(base), folder)
        print("loaded, the same outputs:  ", torch.allclose(loaded(x), model(x), atol=1e-6))
        again = hra_fx.HRAModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
        again.print_trainable_parameters()

        try:
            hra_fx.load_adapter(nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8)), folder)
        except hra_fx.CheckpointError as error:
            print("another base model:        ", str(error).replace(directory, "..."))

        try:
            import peft
        except ImportError:
            return
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        print("in PEFT, largest difference:", f"{(theirs(x) - model(x)).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
