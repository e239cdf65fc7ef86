"""Use an installed hra_fx with its runtime dependencies alone. `make release-check` runs it in a new environment."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import hra_fx


def main() -> None:
    """Import every public name; adapt a model, train a step, save, load, draw and fold it."""
    place = Path(hra_fx.__file__).parent
    assert "site-packages" in place.parts, f"{place} is not an installed package"
    for name in hra_fx.__all__:
        getattr(hra_fx, name)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(16, 3, 8, 8)
    before = model(images)
    hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=["0", "3"]))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    model(images).square().mean().backward()
    optimizer.step()
    adapted = model(images)
    assert (adapted - before).abs().max() > 1e-3
    print(hra_fx.report(model))

    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    other.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        hra_fx.save_adapter(model, folder)
        hra_fx.load_adapter(other, folder)
        for name in ("model.html", "model.svg"):  # the files of the page are package data
            hra_fx.visualize(model, Path(folder, name))
    torch.testing.assert_close(other(images), adapted)
    torch.testing.assert_close(hra_fx.fold(model)(images), adapted, rtol=1e-4, atol=1e-5)
    graph = hra_fx.transform(model, hra_fx.HRAConfig(r=4, target_modules=["0"]), trace=True)
    assert "hra_u" in graph.code and "hra_u" not in hra_fx.fold(graph).code
    print(f"hra_fx {hra_fx.__version__} works in {place}")


if __name__ == "__main__":
    main()
