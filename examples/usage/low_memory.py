"""Low memory: create the vectors on the meta device, and load their values from a file."""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

import hra_fx


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    config = hra_fx.HRAConfig(r=8, target_modules=["0", "2"], init_weights=False)
    trained = hra_fx.transform(copy.deepcopy(base), config)

    model = hra_fx.get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    print("made:  ", {name: p.device.type for name, p in model.named_parameters() if "hra_u" in name})
    try:
        model(torch.randn(1, 512))
    except hra_fx.AdapterError as error:
        print("run:   ", error)
    with tempfile.TemporaryDirectory() as folder:
        hra_fx.save_adapter(trained, folder)
        model.load_adapter(folder, "default")
    print("loaded:", {name: p.device.type for name, p in model.named_parameters() if "hra_u" in name})
    x = torch.randn(1, 512)
    print("the same outputs:", torch.allclose(model(x), trained(x), atol=1e-5))


if __name__ == "__main__":
    main()
