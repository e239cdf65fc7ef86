"""Some quick models of the zoo, and that its checks find damage.

`make zoo` checks all models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo.checks import check
from zoo.entry import Entry
from zoo.models import entries
from zoo.result import CHECKS

import hra_fx

ENTRIES = entries()
#: Quick ones of each library: convolutions, attention, readers of weights (beit, swin), tied weights (gpt2).
QUICK = (
    *("torchvision/swin_t", "timm/vit_tiny_patch16_224", "timm/beit_base_patch16_224", "timm/test_nfnet"),
    "transformers/gpt2",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert list(result.checks) == list(CHECKS)
    assert result.matched


#: The checks that must fail -> what a layer returns in place of its output.
DAMAGES: dict[str, Any] = {
    "": lambda layer, x, y: y,
    "eval train gradients sizes deepcopy": lambda layer, x, y: nn.functional.linear(x[0], layer.hra_base, layer.bias),
    "gradients": lambda layer, x, y: y / 2 + y.detach() / 2,
}


@pytest.mark.parametrize("failing", DAMAGES)
def test_damage_is_found(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(model: Any, config: Any, transform: Any = hra_fx.transform, **options: Any) -> Any:
        transform(model, config, **options)[0].register_forward_hook(DAMAGES[failing])
        return model

    monkeypatch.setattr(hra_fx, "transform", damaged)
    entry = Entry("toy", lambda: nn.Sequential(nn.Linear(6, 5)), lambda n, size: ((torch.randn(n, 4 + size, 6),), {}))
    found = check(entry).failures.keys() - {"trace", "fold", "state_dict"}  # the hook stays, or a graph refuses it
    assert found == {*failing.split()}
