"""Several adapters on one model: switch, apply in order, scale, fold."""

from __future__ import annotations

import torch
from torch import nn

import hra_fx


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{(a - b).abs().max().item():.1e}"


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(4, 16)
    at_base = base(x)

    # init_weights=False gives random reflections, instead of training.
    model = hra_fx.transform(base, hra_fx.HRAConfig(r=4, target_modules=["0", "2"], init_weights=False), "style")
    hra_fx.add_adapter(model, "task", hra_fx.HRAConfig(r=2, target_modules=["2"], init_weights=False))

    hra_fx.set_adapter(model, "task")
    hra_fx.set_adapter(model, ["style", "task"])  # W Q_style Q_task
    both = model(x)
    with hra_fx.disable_adapters(model):
        print("disabled, from the base model:      ", difference(model(x), at_base))

    for scale in (0.0, 0.5, 1.0):  # along the geodesic: an orthogonal Q at every step
        hra_fx.set_scale(model, "task", scale)
        print(f"'task' at {scale}, from both in full:   ", difference(model(x), both))

    print(hra_fx.report(model))
    hra_fx.fold(model)  # both into the weights
    print("folded, from both:                  ", difference(model(x), both))


if __name__ == "__main__":
    main()
